"""Samples follow from their index, and all that is wrong with a user's data is said before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.training import data as module
from qwen_vision_bridge.training.config import RunConfig
from qwen_vision_bridge.training.data import (
    DatasetSamples,
    FolderSamples,
    SampleFileError,
    WorldSamples,
    split_samples,
)

GOOD = {"image": "a.png", "question": "What does it say?", "answer": "HELLO"}
EDIT = {"file_name": "a.png", "instruction": "Make it red.", "target": "b.png"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two sizes, one broken, and no metadata yet."""
    for name, size in (("a.png", (64, 48)), ("b.png", (64, 48)), ("small.png", (32, 32))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "words.png").write_text("no image")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_folder_gives_its_questions_and_its_edits(folder: Path) -> None:
    write(folder, GOOD, EDIT, "")
    asked, edits = FolderSamples(folder, "perceive"), FolderSamples(folder, "edit")
    assert len(asked) == len(edits) == 1
    assert asked[0][1:] == ("What does it say?", "HELLO", None)
    assert edits[0].prompt == "Make it red."
    assert edits[0].after.size == edits[0].image.size == (64, 48)
    before = asked.digest
    Image.new("RGB", (64, 48), (0, 0, 9)).save(folder / "a.png", compress_level=0)
    assert FolderSamples(folder, "perceive").digest != before  # another image, other features


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**GOOD, "image": "none.png"}, "no such image"),
        ({**GOOD, "image": "cut.png"}, "cut short"),
        ({**GOOD, "image": "words.png"}, "not an image"),
        ({**GOOD, "answer": ""}, "answer is missing or empty"),
        ({"question": "Q", "answer": "A"}, "image is missing"),
        ({"image": "a.png"}, "needs question and answer, or instruction and target"),
        ({**EDIT, "target": "gone.png"}, "no such image"),
        ({"image": "a.png", "instruction": "Make it red."}, "target is missing"),
        ({**EDIT, "target": "small.png"}, "the target is .*32, 32.*64, 48"),
        ("{not json", "not valid JSON"),
        ("[1, 2]", "needed is a JSON object"),
        ({**GOOD, "image": "../outside.png"}, "leads out of"),
        ({**GOOD, "question": "What is <|image_pad|>?"}, r"<\\|image_pad\\|>"),
        (r'{"image": "a.png", "question": "\ud83d", "answer": "A"}', "half a surrogate pair"),
    ],
)
def test_every_fault_is_named_with_its_line(folder: Path, row: Any, fault: str) -> None:
    write(folder, GOOD, row)
    with pytest.raises(SampleFileError, match=f"metadata.jsonl, line 2: .*{fault}"):
        FolderSamples(folder, "perceive")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**GOOD, "question": "word " * 6000}, "tokens, at most 3000 fit"),
        ({**GOOD, "image": "tiny.png"}, "smaller than one vision token"),
        ({**GOOD, "image": "strip.png"}, "longer than the models' 200:1"),
        ({**EDIT, "image": "long.png", "target": "long.png"}, "longer than the 64:1"),
    ],
)
def test_what_the_models_cannot_take_is_found_before_they_load(folder: Path, row: Any, fault: str) -> None:
    for name, size in (("tiny", (2, 2)), ("strip", (8 * 300, 8)), ("long", (8 * 80, 8))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    write(folder, GOOD, row)
    with pytest.raises(SampleFileError, match=f"metadata.jsonl, line 2: .*{fault}"):
        FolderSamples(folder, "perceive", FAMILIES["miniature"])


def test_lines_and_upright_images_are_read_as_they_are_meant(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), "red").save(folder / "phone.jpg", exif=exif)
    Image.new("RGB", (48, 64), "blue").save(folder / "upright.png")
    Image.new("RGB", (64, 48), "blue").save(folder / "stored.png")
    separator = {**GOOD, "question": "One\u2028two\u0085?"}
    write(folder, separator, {**EDIT, "image": "phone.jpg", "target": "upright.png"})
    assert FolderSamples(folder, "perceive")[0].prompt == separator["question"]
    sample = FolderSamples(folder, "edit")[0]
    assert sample.after is not None
    assert sample.image.size == sample.after.size == (48, 64)
    write(folder, GOOD, {**EDIT, "image": "phone.jpg", "target": "stored.png"})
    with pytest.raises(SampleFileError, match=r"the target is .*64, 48.*48, 64"):
        FolderSamples(folder, "edit")


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_of_samples_below_1_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="max_train_samples is a whole number from 1"):
        RunConfig(FAMILIES["miniature"], "perceive", Path("runs"), max_train_samples=count)


def test_all_faults_come_at_once_and_empty_data_is_refused(folder: Path) -> None:
    write(folder, *[{**GOOD, "answer": ""}] * 30)
    with pytest.raises(SampleFileError, match=r"(?s)line 1: .*line 20: .*and 10 more"):
        FolderSamples(folder, "perceive")
    write(folder, GOOD)
    with pytest.raises(SampleFileError, match="no line with image, instruction and target"):
        FolderSamples(folder, "edit")
    write(folder, "")
    with pytest.raises(SampleFileError, match="no line with"):
        FolderSamples(folder, "perceive")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderSamples(folder / "nowhere", "perceive")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.jsonl"):
        FolderSamples(folder / "empty", "perceive")
    with pytest.raises(ValueError, match="at least two"):
        split_samples(FolderSamples(write(folder, GOOD), "perceive"), 10)


def test_a_dataset_without_package_or_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="package `datasets`, which is not installed"):
        DatasetSamples("someone/something", "perceive")

    class Rows(list):
        column_names = ("image", "question", "answer")
        _fingerprint = "f"

    rows = Rows([{"image": Image.new("L", (8, 8)), "question": "Q", "answer": "A"}])
    stand_in = SimpleNamespace(load_dataset=lambda name, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert DatasetSamples("x/y", "perceive")[0][1:] == ("Q", "A", None)
    assert DatasetSamples("x/y", "perceive")[0].image.mode == "RGB"
    rows[0]["image"] = Image.fromarray(
        np.full((8, 8), 257, np.uint16)
    )  # dark; Pillow's `convert` makes it white
    assert DatasetSamples("x/y", "perceive")[0].image.getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(ValueError, match="no column 'instruction'"):
        DatasetSamples("x/y", "edit")


def test_world_samples_follow_from_their_index() -> None:
    one, again = WorldSamples("perceive", "train", 8), WorldSamples("perceive", "train", 20)
    for index in range(8):
        assert one[index][1:] == again[index][1:]
        assert np.array_equal(one[index].image, again[index].image)
    assert one.digest != again.digest
    held = WorldSamples("perceive", "validation", 8)
    assert all(not np.array_equal(one[i].image, held[i].image) for i in range(8))
    edits = WorldSamples("edit", "train", 4)
    assert all(edits[i].after.size == edits[i].image.size for i in range(4))
    with pytest.raises(ValueError, match="split"):
        WorldSamples("perceive", "elsewhere", 3)


def test_a_model_that_does_not_know_the_world_is_told_the_form() -> None:
    asked = [WorldSamples("perceive", "train", 40, knows_world=False)[index] for index in range(40)]
    assert {sample.prompt.split()[0] for sample in asked} == {"What", "Where", "How"}
    assert all("Reply with" in sample.prompt for sample in asked)
    assert all(sample.answer != "nothing" for sample in asked if sample.prompt.startswith("What"))


def test_held_out_samples_are_never_trained_on() -> None:
    whole = WorldSamples("perceive", "train", 50)
    train, validation = split_samples(whole, 4)
    assert len(validation) == 4
    assert sorted([*train.indices, *validation.indices]) == list(range(50))
    assert len(split_samples(whole, 256)[1]) == 5  # a tenth
    assert validation[0][1:] == whole[validation.indices[0]][1:]
    assert module.Subset(whole, [1, 2]).digest != module.Subset(whole, [1, 3]).digest
