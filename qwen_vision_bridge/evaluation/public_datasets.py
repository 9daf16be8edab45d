"""Public benchmarks as they lie on a user's disk, in the layouts that their authors publish.

TextEdit's classic track: a checkout of open-compass/TextEdit with its `data/`. PIE-Bench: the unpacked data
of cure-lab/PnPInversion. GEdit-Bench: the dataset stepfun-ai/GEdit-Bench as downloaded (`*.arrow` or
`*.parquet` files, read with pyarrow, the `benchmarks` extra), or a folder of images exported from it with a
`metadata.jsonl` of the dataset's own columns, the image-folder layout of Hugging Face.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..case import OTHER, Case
from ..images import load_images
from ..io import read_json
from .folder_dataset import (
    CaseFileError,
    image_at,
    load_folder,
    read_cases,
    read_lines,
    required_file,
    text_of,
)

PIE_SIDE = 512  # px: PIE-Bench's images and masks


def load_cases(layout: str, folder: str | Path) -> list[Case]:
    """The cases of a folder: `own`, `textedit`, `textedit-full`, `pie`, `gedit` or `gedit-cn`.

    Raises:
        ValueError: another layout; and what the layout's own function raises.
    """
    loaders: dict[str, Callable[[], list[Case]]] = {
        "own": lambda: load_folder(folder),
        "textedit": lambda: load_textedit(folder),
        "textedit-full": lambda: load_textedit(folder, "fullset"),
        "pie": lambda: load_pie(folder),
        "gedit": lambda: load_gedit(folder),
        "gedit-cn": lambda: load_gedit(folder, "cn"),
    }
    if layout not in loaders:
        raise ValueError(f"the layout of a folder of cases is one of {', '.join(loaders)}, not {layout!r}")
    return loaders[layout]()


def load_textedit(folder: str | Path, subset: str = "miniset") -> list[Case]:
    """TextEdit's classic track (open-compass/TextEdit): `eval_prompts/<subset>/*.jsonl` and `data/`.

    Raises:
        FileNotFoundError: no such subset. CaseFileError: every fault in its files.
    """
    root = Path(folder)
    files = sorted((root / "eval_prompts" / subset).glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no eval_prompts/{subset}/*.jsonl in {root}: give a checkout of TextEdit")

    def case(row: dict[str, Any], where: Path) -> Case:
        image, name = image_at(root / "data", row, "original_image"), f"textedit-{where.stem}-{row['id']}"
        prompt, target = text_of(row, "prompt"), image_at(root / "data", row, "gt_image")
        texts = {"source_text": text_of(row, "source_text"), "expected_text": text_of(row, "target_text")}
        truth: dict[str, Any] = {**texts, "text_is_part": True, "dataset": "textedit"}
        return Case(name, "ocr", where.stem, prompt, image, target, **truth)

    return read_lines(files, case)


def load_pie(folder: str | Path) -> list[Case]:
    """PIE-Bench (cure-lab/PnPInversion): `mapping_file.json`, `annotation_images/`, masks as runs.

    Raises:
        FileNotFoundError: no `mapping_file.json`. CaseFileError: every faulty entry.
    """
    root = Path(folder)
    path = required_file(root / "mapping_file.json")

    def case(entry: tuple[str, dict[str, Any]]) -> Case:
        key, row = entry
        image = image_at(root / "annotation_images", row, "image_path")
        mask = decode_runs(row["mask"], (PIE_SIDE, PIE_SIDE))
        if image.size != (PIE_SIDE, PIE_SIDE):
            raise ValueError(f"the image is {image.size} px, its mask {PIE_SIDE} × {PIE_SIDE}")
        kind, prompt = f"type{row['editing_type_id']}", text_of(row, "editing_instruction")
        return Case(f"pie-{key}", "detail", kind, prompt, image, edit_mask=mask, dataset="pie")

    return read_cases(_entries(path), case, path)


def load_gedit(folder: str | Path, language: str = "en") -> list[Case]:
    """GEdit-Bench (stepfun-ai/Step1X-Edit), the instructions of one language.

    Columns: `key`, `task_type`, `instruction`, `instruction_language`, `input_image`, `Intersection_exist`
    (and `input_image_raw`, which is not used: the authors' own script edits `input_image`). An exported
    folder has `file_name` instead of the image, as the authors' script saves it
    (`fullset/<task>/<language>/<key>_SRCIMG.png`) or otherwise.

    Raises:
        FileNotFoundError: neither dataset files nor `metadata.jsonl` there.
        ValueError: dataset files without pyarrow. CaseFileError: every faulty row.
    """
    root = Path(folder)
    tables = [path for ending in ("arrow", "parquet") for path in sorted(root.rglob(f"*.{ending}"))]
    if tables:
        rows = (
            (f"{path}, row {number}", row) for path in tables for number, row in enumerate(_table_rows(path))
        )
        return read_cases(rows, lambda row: _gedit_case(row, language, _stored), tables[0])
    if not (root / "metadata.jsonl").is_file():
        raise FileNotFoundError(
            f"no *.arrow, *.parquet or metadata.jsonl in {root}: give GEdit-Bench's files"
        )

    def case(row: dict[str, Any], _where: Path) -> Case | None:
        return _gedit_case(row, language, lambda row: image_at(root, row, "file_name"))

    return read_lines([root / "metadata.jsonl"], case)


def decode_runs(runs: list[int], shape: tuple[int, int]) -> np.ndarray:
    """A PIE-Bench mask, bool (H, W): start and length in turn, row by row; its rim counts as edited there.

    Raises:
        ValueError: an odd number of runs, or one that starts outside the image.
    """
    starts, lengths = runs[::2], runs[1::2]
    size = shape[0] * shape[1]
    if len(starts) != len(lengths) or any(not 0 <= start < size for start in starts):
        raise ValueError(f"the mask's runs do not fit {shape[1]} × {shape[0]} px")
    flat: np.ndarray = np.zeros(size, dtype=bool)
    for start, length in zip(starts, lengths, strict=True):
        flat[start : start + length] = True
    mask = flat.reshape(shape)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def _entries(path: Path) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """The entries of a JSON object with their keys, each with the line that names it."""
    try:
        entries = read_json(path)
    except ValueError as error:
        raise CaseFileError(str(error)) from error
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for key, row in entries.items():
        number = next((n for n, line in enumerate(lines, start=1) if json.dumps(key) in line), 1)
        yield f"{path}, line {number}, entry {key!r}", (key, row)


def _gedit_case(
    row: dict[str, Any], language: str, image_of: Callable[[dict[str, Any]], Image.Image]
) -> Case | None:
    if text_of(row, "instruction_language") != language:
        return None
    task = text_of(row, "task_type")
    group = "ocr" if task == "text_change" else OTHER
    name, prompt = f"gedit-{language}-{text_of(row, 'key')}", text_of(row, "instruction")
    return Case(name, group, task, prompt, image_of(row), dataset="gedit")


def _stored(row: dict[str, Any]) -> Image.Image:
    """An image as `datasets` stores it: its file's bytes in a struct."""
    stored = row["input_image"]
    if not isinstance(stored, dict) or not stored.get("bytes"):
        raise ValueError("input_image holds no bytes of an image")
    return load_images(stored["bytes"])[0]


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow stream, as `datasets` writes it, or of a Parquet file, one batch at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} is read with pyarrow, which is not here: the extra `benchmarks`") from error
    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=16)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged, or no file of a dataset: {error}") from error
