"""Packs of features resume where they were cut off, and joined ones are the pack of all their samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.packs import Pack, build_pack, join


def length(chunk: Any) -> list[dict[str, Any]]:
    """One field that tells the samples apart."""
    return [{"early": torch.full((2, 3), float(len(sample.prompt))), "grid": [1, 2]} for sample in chunk]


def same(one: Pack, other: Pack) -> bool:
    return one.texts() == other.texts() and all(
        torch.equal(row, twin) for row, twin in zip(one.fields["early"], other.fields["early"], strict=True)
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "first"])
def test_a_pack_that_was_cut_off_is_finished_and_equal(damage: str, tmp_path: Path) -> None:
    samples, calls = WorldSamples("perceive", "train", 70), []

    def see() -> Any:
        return lambda chunk: calls.append(len(chunk)) or length(chunk)

    whole = build_pack(tmp_path / "whole", samples, see, "k")
    assert calls == [64, 6]
    build_pack(tmp_path / "part", samples, see, "k")
    first, last = sorted((tmp_path / "part").glob("*.safetensors"))
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:-1])
    else:
        (first if damage == "first" else last).unlink()
    calls.clear()
    assert same(build_pack(tmp_path / "part", samples, see, "k"), whole)
    assert calls == [64 if damage == "first" else 6]
    build_pack(tmp_path / "part", samples, lambda: pytest.fail("a finished pack needs no model"), "k")


def test_a_pack_killed_while_its_models_run_resumes(tmp_path: Path) -> None:
    samples, calls = WorldSamples("perceive", "train", 70), []

    def dies(chunk: Any) -> Any:
        if len(chunk) == 6:
            raise KeyboardInterrupt
        return length(chunk)

    with pytest.raises(KeyboardInterrupt):
        build_pack(tmp_path, samples, lambda: dies, "k")
    with pytest.raises(FileNotFoundError):
        Pack(tmp_path)
    pack = build_pack(tmp_path, samples, lambda: lambda chunk: calls.append(len(chunk)) or length(chunk), "k")
    assert calls == [6]
    assert len(pack) == 70


@pytest.mark.parametrize("name", ["features-00000.safetensors", "index.json"])
def test_a_pack_refuses_files_that_are_not_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises((FileExistsError, ValueError), match=name):
        build_pack(tmp_path, WorldSamples("perceive", "train", 3), lambda: length, "k")
    assert (tmp_path / name).read_bytes() == b"mine"


def test_other_samples_and_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"mine")
    build_pack(tmp_path, WorldSamples("perceive", "train", 5), lambda: length, "k")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for count, key in ((3, "k"), (5, "other")):
        with pytest.raises(ValueError, match="give another"):
            build_pack(tmp_path, WorldSamples("perceive", "train", count), lambda: length, key)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_of_several_shards_come_in_the_order_asked(tmp_path: Path) -> None:
    pack = build_pack(tmp_path, WorldSamples("perceive", "train", 70), lambda: length, "k")
    samples = torch.tensor([69, 0, 65, 0])
    rows = pack.rows("early", samples)
    assert rows.shape == (4, 2, 3)
    assert rows[:, 0, 0].tolist() == [len(pack.texts()[index][0]) for index in samples]


def test_joined_packs_are_the_pack_of_all_their_samples(tmp_path: Path) -> None:
    def look(samples: Any) -> list[dict[str, Any]]:
        grids = [(1 + len(sample.prompt) % 2, 2) for sample in samples]
        return [
            {"vision": torch.full((2 * rows, 3), float(len(sample.prompt))), "grid": [rows, columns]}
            for sample, (rows, columns) in zip(samples, grids, strict=True)
        ]

    whole = build_pack(tmp_path / "whole", WorldSamples("perceive", "train", 10), lambda: look, "k")
    parts = [
        build_pack(
            tmp_path / f"{first}", WorldSamples("perceive", "train", count, first=first), lambda: look, "k"
        )
        for first, count in ((0, 6), (6, 4))
    ]
    joined = join(parts)
    assert joined.texts() == whole.texts()
    assert joined.layouts.keys() == whole.layouts.keys()
    for name, members in whole.layouts.items():
        assert torch.equal(joined.layouts[name], members)
        assert torch.equal(joined.rows("vision", members), whole.rows("vision", members))
