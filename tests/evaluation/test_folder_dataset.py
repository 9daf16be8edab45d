"""Cases from files: every fault is named with file and line, and benchmarks are read as they come."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.evaluation.folder_dataset import CaseFileError, load_folder
from qwen_vision_bridge.evaluation.metrics.registry import verdict_of
from qwen_vision_bridge.evaluation.public_datasets import decode_runs, load_gedit, load_pie, load_textedit
from qwen_vision_bridge.evaluation.scoring import measure
from qwen_vision_bridge.synthetic.cases import make_cases

GOOD = {"id": "a", "image": "a.png", "prompt": "<script>alert(1)</script>"}


@pytest.fixture
def folder(tmp_path: Path, photo: Image.Image) -> Path:
    inner = tmp_path / "cases"
    inner.mkdir()
    for path in (inner / "a.png", tmp_path / "outside.png"):
        photo.save(path)
    Image.new("L", (10, 10), 255).save(inner / "small.png")
    mask = np.zeros((160, 240), np.uint8)
    mask[:80] = 255
    Image.fromarray(mask).save(inner / "mask.png")
    return inner


def write(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "cases.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_photograph_gets_the_metrics_that_need_no_truth(folder: Path) -> None:
    write(folder, GOOD)
    (case,) = load_folder(folder)
    assert case.prompt == GOOD["prompt"]  # as it is: escaping is the page's work
    drift = {"drift_shift_px", "drift_scale_percent", "drift_rotation_deg"}
    assert set(measure(case, case.image)) == drift | {"change_from_input"}
    write(folder, {**GOOD, "mask": "mask.png", "target": "a.png", "group": "detail", "difficulty": "hard"})
    (case,) = load_folder(folder)
    more = {"unedited_ssim", "unedited_psnr_db", "unedited_texture", "edited_ssim"}
    assert set(measure(case, case.image)) == drift | more | {
        "target_difference",
        "edited_colour_error",
        "edited_ssim",
    }


@pytest.mark.slow
def test_text_that_is_not_there_is_not_kept(folder: Path) -> None:
    """An image without text has no share of it that an edit could keep; one with text has."""
    write(folder, GOOD)
    (case,) = load_folder(folder)
    assert "text_kept" not in measure(case, case.image)
    written = replace(case, image=make_cases("ocr", 1, kinds=("change_text",))[0].image)
    assert measure(written, written.image)["text_kept"] == 1
    assert measure(written, Image.new("RGB", written.image.size))["text_kept"] == 0


def test_an_own_case_is_right_where_its_text_is_read(folder: Path) -> None:
    """Where a target is stated as well, the text alone decides nothing."""
    (made,) = make_cases("ocr", 1, kinds=("change_text",))
    for name, image in (("before", made.image), ("after", made.target)):
        image.save(folder / f"{name}.png")
    row = {"id": "a", "image": "before.png", "prompt": made.prompt, "expected_text": made.expected_text}
    write(folder, row, {**row, "id": "b", "target": "after.png"})
    text, both = load_folder(folder)
    assert [verdict_of(measure(text, image)) for image in (made.image, made.target)] == [0, 1]
    assert verdict_of(measure(both, made.target)) is None
    assert measure(both, made.target)["target_difference"] == 0


def test_references_come_before_the_image_in_their_order(folder: Path, photo: Image.Image) -> None:
    photo.rotate(180).save(folder / "b.png")
    write(folder, {**GOOD, "references": ["b.png", "small.png"]}, {**GOOD, "id": "b"})
    case, plain = load_folder(folder)
    assert [image.size for image in case.images] == [(240, 160), (10, 10), (240, 160)]
    assert case.references[0].tobytes() == photo.rotate(180).tobytes()
    assert case.images[-1].tobytes() == photo.tobytes()
    assert plain.references == ()


def test_every_fault_is_named_with_file_and_line(folder: Path) -> None:
    faults = [
        ("{broken", "Expecting property name"),
        ({**GOOD, "image": "absent.png", "id": "b"}, "no such image"),
        ({**GOOD, "mask": "small.png", "id": "c"}, r"the mask is (10, 10) px, its image (240, 160)"),
        (GOOD, "the id 'a' is that of"),
        ({**GOOD, "image": "../outside.png", "id": "d"}, "leads out of"),
        ({**GOOD, "id": "<b>"}, "is no file name"),
        ({"id": "e", "image": "a.png"}, "the field 'prompt' is missing"),
        ({**GOOD, "id": "f", "promt": "x"}, "unknown field 'promt'"),
        ({**GOOD, "id": "g", "boxes": [{"colour": "red", "box": [0, 0, 999, 9]}]}, "a box is a colour"),
        ({**GOOD, "id": "h", "references": "a.png"}, "references is a list of image paths"),
        ({**GOOD, "id": "i", "references": ["../outside.png"]}, "leads out of"),
        ({**GOOD, "id": "j", "references": [3]}, "references is a text, not 3"),
        ("[1]", "needed is a JSON object"),
    ]
    write(folder, GOOD, *(row for row, _ in faults))
    with pytest.raises(CaseFileError) as raised:
        load_folder(folder)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(faults)
    for number, (line, (_, says)) in enumerate(zip(lines, faults, strict=True), start=2):
        assert line.startswith(f"{folder / 'cases.jsonl'}, line {number}: ")
        assert says in line
    with pytest.raises(FileNotFoundError, match=r"cases\.jsonl"):
        load_folder(folder.parent)


def test_textedit_is_read_as_its_repository_lays_it_out(tmp_path: Path, photo: Image.Image) -> None:
    row = {
        "id": 3,
        "prompt": "Replace the text 'A' with 'B'.",
        "source_text": "A",
        "target_text": "B",
        "original_image": "1.1.1/image/original/x.png",
        "gt_image": "1.1.1/image/gt/x.png",
        "gt_caption": "",
    }
    for part in ("original", "gt"):
        (tmp_path / "data/1.1.1/image" / part).mkdir(parents=True)
        photo.save(tmp_path / "data/1.1.1/image" / part / "x.png")
    (tmp_path / "eval_prompts/miniset").mkdir(parents=True)
    (tmp_path / "eval_prompts/miniset/1.1.1.jsonl").write_text(json.dumps(row))
    (case,) = load_textedit(tmp_path)
    assert (case.case_id, case.expected_text, case.text_is_part) == ("textedit-1.1.1-3", "B", True)
    with pytest.raises(FileNotFoundError, match="fullset"):
        load_textedit(tmp_path, "fullset")


def test_pie_masks_are_decoded_and_their_rim_is_edited(tmp_path: Path, photo: Image.Image) -> None:
    mask = decode_runs([513, 3, 2 * 512 + 5, 2], (512, 512))
    assert mask[1, 1:4].all()
    assert not mask[1, 4:-1].any()
    assert mask[2, 5:7].all()
    assert mask[0].all()
    assert mask[:, -1].all()
    entry = {
        "image_path": "0_random_140/x.jpg",
        "original_prompt": "a [cat]",
        "editing_prompt": "a [dog]",
        "editing_instruction": "Make it a dog",
        "editing_type_id": "0",
        "mask": [513, 3],
    }
    (tmp_path / "annotation_images/0_random_140").mkdir(parents=True)
    photo.resize((512, 512)).save(tmp_path / "annotation_images/0_random_140/x.jpg")
    (tmp_path / "mapping_file.json").write_text(json.dumps({"000": entry}, indent=1))
    (case,) = load_pie(tmp_path)
    assert (case.case_id, case.prompt, case.edit_mask.dtype) == ("pie-000", "Make it a dog", bool)
    bad = {"000": entry, "001": {**entry, "mask": [999999, 1]}}
    (tmp_path / "mapping_file.json").write_text(json.dumps(bad, indent=None, separators=(",\n", ": ")))
    with pytest.raises(CaseFileError, match=r"line 8, entry '001': the mask's runs do not fit"):
        load_pie(tmp_path)


COLUMNS = {
    "key": "k1",
    "task_type": "text_change",
    "instruction": "Change the text",
    "instruction_language": "en",
    "Intersection_exist": True,
}


def test_gedit_is_read_from_the_files_of_its_dataset(tmp_path: Path, photo: Image.Image) -> None:
    """Images lie in Arrow streams as structs of bytes and path, as `datasets` writes them."""
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    chinese = {"instruction": "改字", "instruction_language": "cn"}
    changes = ({}, {"key": "k2"}, chinese, {"key": "k3", "task_type": "style_change"})
    rows = [{**COLUMNS, **change, "input_image": stored} for change in changes]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "arrow").mkdir()
    path = tmp_path / "arrow" / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    for folder in (tmp_path / "arrow", tmp_path / "parquet"):
        cases = load_gedit(folder)
        assert [(case.case_id, case.group) for case in cases] == [
            ("gedit-en-k1", "ocr"),
            ("gedit-en-k2", "ocr"),
            ("gedit-en-k3", "other"),
        ]
        assert np.array_equal(np.asarray(cases[0].image), np.asarray(photo))
        (other,) = load_gedit(folder, "cn")
        assert other.prompt == "改字"
    rows[1]["input_image"] = {"bytes": b"", "path": "x.png"}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "data" / "train.parquet")
    with pytest.raises(CaseFileError, match=r"train\.parquet, row 1: input_image holds no bytes"):
        load_gedit(tmp_path / "parquet")
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged, or no file of a dataset"):
        load_gedit(tmp_path / "arrow")


def test_gedit_is_read_from_an_exported_folder(tmp_path: Path, photo: Image.Image) -> None:
    (tmp_path / "fullset/text_change/en").mkdir(parents=True)
    photo.save(tmp_path / "fullset/text_change/en/k1_SRCIMG.png")
    row = {**COLUMNS, "file_name": "fullset/text_change/en/k1_SRCIMG.png"}
    other = {**row, "instruction_language": "cn"}
    (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    (case,) = load_gedit(tmp_path)
    assert (case.case_id, case.group, case.prompt) == ("gedit-en-k1", "ocr", "Change the text")
    assert measure(case, case.image)["change_from_input"] == 0
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "file_name": "../k.png"}))
    with pytest.raises(CaseFileError, match="leads out of"):
        load_gedit(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        load_gedit(tmp_path)
