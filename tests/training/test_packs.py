"""Packs of features go on where they were cut off, and joined ones are the pack of all their samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.packs import Pack, build_pack, join


def test_a_pack_that_was_cut_off_is_finished_and_equal(tmp_path: Path) -> None:
    samples, calls = WorldSamples("perceive", "train", 70), []

    def see() -> Any:
        def looking(chunk: Any) -> Any:
            calls.append(len(chunk))
            return [
                {"early": torch.full((2, 3), float(len(sample.prompt))), "grid": [1, 2]} for sample in chunk
            ]

        return looking

    whole = build_pack(tmp_path / "whole", samples, see, "k")
    assert calls == [64, 6]
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    (half / "pack.json").unlink()
    lines = (half / "samples.jsonl").read_text().splitlines(keepends=True)
    (half / "samples.jsonl").write_text("".join(lines[:10]) + lines[10][:7])  # killed in the middle of a line
    again = build_pack(half, samples, see, "k")
    assert calls == [64, 6, 60]
    assert torch.equal(again.fields["early"], whole.fields["early"])
    assert again.texts() == whole.texts()
    build_pack(half, samples, see, "k")
    assert calls == [64, 6, 60]  # finished: nothing is seen again
    build_pack(half, WorldSamples("perceive", "train", 3), see, "k")
    assert len(Pack(half)) == 3  # other samples: made anew


def constant(chunk: Any) -> list[dict[str, Any]]:
    return [{"early": torch.ones(2, 3), "grid": [1, 2]} for _ in chunk]


def test_a_pack_removes_and_cuts_its_own_files_alone(tmp_path: Path) -> None:
    """Made anew for other samples, after a kill before the first sample, and after one between two."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"mine")
    for count in (5, 3):
        build_pack(tmp_path, WorldSamples("perceive", "train", count), lambda: constant, "k")
    for lines in (None, ""):
        (tmp_path / "pack.json").unlink()
        (tmp_path / "samples.jsonl").unlink()
        if lines is not None:
            (tmp_path / "samples.jsonl").write_text(lines)
        pack = build_pack(tmp_path, WorldSamples("perceive", "train", 3), lambda: constant, "k")
        assert len(pack) == 3
        assert torch.equal(pack.fields["early"].float(), torch.ones(6, 3))
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["early.bin", "samples.jsonl", "pack.json"])
def test_a_pack_refuses_files_that_are_not_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=name):
        build_pack(tmp_path, WorldSamples("perceive", "train", 3), lambda: constant, "k")
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_pack_begun_without_its_fields_goes_on(tmp_path: Path) -> None:
    """As packs were until their fields were listed first."""
    calls: list[int] = []
    samples = WorldSamples("perceive", "train", 3)
    build_pack(tmp_path, samples, lambda: constant, "k")
    begun = json.loads((tmp_path / "begun.json").read_text())
    (tmp_path / "begun.json").write_text(json.dumps({k: v for k, v in begun.items() if k != "fields"}))
    build_pack(tmp_path, samples, lambda: calls.append(1), "k")  # type: ignore[arg-type, return-value]
    assert not calls
    build_pack(tmp_path, WorldSamples("perceive", "train", 2), lambda: constant, "k")
    assert len(Pack(tmp_path).fields["early"]) == 4


def test_joined_packs_are_the_pack_of_all_their_samples(tmp_path: Path) -> None:
    def see() -> Any:
        def look(samples: Any) -> list[dict[str, Any]]:
            grids = [(1 + len(sample.prompt) % 2, 2) for sample in samples]
            return [
                {"vision": torch.full((2 * rows, 3), float(len(sample.prompt))), "grid": [rows, columns]}
                for sample, (rows, columns) in zip(samples, grids, strict=True)
            ]

        return look

    whole = build_pack(tmp_path / "whole", WorldSamples("perceive", "train", 10), see, "k")
    parts = [
        build_pack(tmp_path / f"{first}", WorldSamples("perceive", "train", count, first=first), see, "k")
        for first, count in ((0, 6), (6, 4))
    ]
    joined = join(parts)
    assert joined.texts() == whole.texts()
    assert joined.layouts.keys() == whole.layouts.keys()
    for name, members in whole.layouts.items():
        assert torch.equal(joined.layouts[name], members)
        assert torch.equal(joined.rows("vision", members), whole.rows("vision", members))
