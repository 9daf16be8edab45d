"""Cases from files: a folder of the user's own, and public benchmarks in the layouts of their repositories.

Every fault is found before anything runs, and each is named with its file and line.

Own folder: `cases.jsonl`, one object a line with `id`, `image`, `prompt`, and where they are known `group`,
`difficulty`, `target`, `mask` (white may change), `source_text`, `expected_text` and `boxes` (`colour` of
`scenes.COLOURS` and `box`, left, top, right, bottom in px). Paths are relative to the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import load_images
from .scenes import COLOURS
from .world import GROUPS

OTHER = "other"
FIELDS = {
    "id",
    "image",
    "prompt",
    "group",
    "difficulty",
    "target",
    "mask",
    "source_text",
    "expected_text",
    "boxes",
}
SAFE_ID = re.compile(r"[\w][\w.-]{0,120}")
PIE_SIDE = 512  # px: PIE-Bench's pictures and masks


@dataclass(frozen=True, eq=False)
class FileCase:
    """A case whose truth is known as far as its file says; the names are those of `world.Case`."""

    case_id: str
    group: str
    kind: str
    prompt: str
    image: Image.Image
    target: Image.Image | None = None
    edit_mask: np.ndarray | None = None
    source_text: str | None = None
    expected_text: str | None = None
    boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    difficulty: str = "easy"
    text_is_part: bool = False
    """Whether the picture says more than the text that is to change."""
    references: tuple[Image.Image, ...] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures of the prompt."""
        return [*self.references, self.image]


LAYOUTS = ("own", "textedit", "textedit-full", "pie", "gedit", "gedit-cn")


def load_cases(layout: str, folder: str | Path) -> list[FileCase]:
    """The cases of a folder in one of `LAYOUTS`.

    Raises:
        ValueError: another layout; and what the layout's own function raises.
    """
    loaders: dict[str, Callable[[], list[FileCase]]] = {
        "own": lambda: load_folder(folder),
        "textedit": lambda: load_textedit(folder),
        "textedit-full": lambda: load_textedit(folder, "fullset"),
        "pie": lambda: load_pie(folder),
        "gedit": lambda: load_gedit(folder),
        "gedit-cn": lambda: load_gedit(folder, "cn"),
    }
    if layout not in loaders:
        raise ValueError(f"the layout of a folder of cases is one of {', '.join(LAYOUTS)}, not {layout!r}")
    return loaders[layout]()


class CaseFileError(ValueError):
    """One or more faults in case files, a line each with file and line number."""


def load_folder(folder: str | Path) -> list[FileCase]:
    """The cases of a user's own folder.

    Raises:
        FileNotFoundError: no `cases.jsonl` there.
        CaseFileError: every fault in it.
    """
    path = _existing(Path(folder) / "cases.jsonl")
    return _collect([path], lambda row, where: _own_case(path.parent, row, where))


def load_textedit(folder: str | Path, subset: str = "miniset") -> list[FileCase]:
    """TextEdit's classic track (open-compass/TextEdit): `eval_prompts/<subset>/*.jsonl` and `data/`.

    Raises:
        FileNotFoundError: no such subset. CaseFileError: every fault in its files.
    """
    root = Path(folder)
    files = sorted((root / "eval_prompts" / subset).glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no eval_prompts/{subset}/*.jsonl in {root}: give a checkout of TextEdit")

    def case(row: dict[str, Any], where: Path) -> FileCase:
        image = _picture(root / "data", row, "original_image")
        return FileCase(
            f"textedit-{where.stem}-{row['id']}", "ocr", where.stem, _text(row, "prompt"), image,
            _sized(_picture(root / "data", row, "gt_image"), image.size), None, _text(row, "source_text"),
            _text(row, "target_text"), text_is_part=True,
        )  # fmt: skip

    return _collect(files, case)


def load_pie(folder: str | Path) -> list[FileCase]:
    """PIE-Bench (cure-lab/PnPInversion): `mapping_file.json`, `annotation_images/`, masks as runs.

    Raises:
        FileNotFoundError: no `mapping_file.json`. CaseFileError: every faulty entry.
    """
    root = Path(folder)
    path = _existing(root / "mapping_file.json")
    entries = _read_object(path)

    def case(key: str, row: dict[str, Any]) -> FileCase:
        image = _picture(root / "annotation_images", row, "image_path")
        mask = decode_runs(row["mask"], (PIE_SIDE, PIE_SIDE))
        if image.size != (PIE_SIDE, PIE_SIDE):
            raise ValueError(f"the picture is {image.size} px, its mask {PIE_SIDE} × {PIE_SIDE}")
        kind = f"type{row['editing_type_id']}"
        return FileCase(
            f"pie-{key}", "detail", kind, _text(row, "editing_instruction"), image, edit_mask=mask
        )

    return _each(path, entries, case)


def load_gedit(folder: str | Path, language: str = "en") -> list[FileCase]:
    """GEdit-Bench (stepfun-ai/Step1X-Edit): `fullset/<task>/<language>/<key>_SRCIMG.png` as its example
    script saves them, and `instructions.json`, an object of key to instruction from the dataset's columns.

    Raises:
        FileNotFoundError: one of them is missing. CaseFileError: every picture without an instruction.
    """
    root = Path(folder)
    path = _existing(root / "instructions.json")
    instructions = _read_object(path)
    pictures = {
        shown.stem.removesuffix("_SRCIMG"): shown
        for shown in sorted(root.glob(f"fullset/*/{language}/*_SRCIMG.png"))
    }
    if not pictures:
        raise FileNotFoundError(f"no fullset/*/{language}/*_SRCIMG.png in {root}")

    def case(key: str, shown: Path) -> FileCase:
        task = shown.parent.parent.name
        group = "ocr" if task == "text_change" else OTHER
        image = load_images(shown)[0]
        return FileCase(f"gedit-{language}-{key}", group, task, _text(instructions, key), image)

    return _each(path, pictures, case)


def decode_runs(runs: list[int], shape: tuple[int, int]) -> np.ndarray:
    """A PIE-Bench mask, bool (H, W): start and length in turn, row by row; its rim counts as edited there.

    Raises:
        ValueError: an odd number of runs, or one that starts outside the picture.
    """
    starts, lengths = runs[::2], runs[1::2]
    size = shape[0] * shape[1]
    if len(starts) != len(lengths) or any(not 0 <= start < size for start in starts):
        raise ValueError(f"the mask's runs do not fit {shape[1]} × {shape[0]} px")
    flat = np.zeros(size, dtype=bool)
    for start, length in zip(starts, lengths, strict=True):
        flat[start : start + length] = True
    mask = flat.reshape(shape)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def _own_case(folder: Path, row: dict[str, Any], _where: Path) -> FileCase:
    if unknown := sorted(set(row) - FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(FIELDS))}")
    group, difficulty = row.get("group", OTHER), row.get("difficulty", "easy")
    if group not in (*GROUPS, OTHER) or difficulty not in ("easy", "hard"):
        raise ValueError(f"group is one of {', '.join((*GROUPS, OTHER))}, difficulty easy or hard")
    image = _picture(folder, row, "image")
    target = _sized(_picture(folder, row, "target"), image.size) if "target" in row else None
    mask = _mask(folder, row, image.size) if "mask" in row else None
    texts = [_text(row, name) if name in row else None for name in ("source_text", "expected_text")]
    return FileCase(
        _text(row, "id"), group, "own", _text(row, "prompt"), image, target, mask, *texts,
        boxes=_boxes(row.get("boxes", []), image.size), difficulty=difficulty,
    )  # fmt: skip


def _boxes(given: Any, size: tuple[int, int]) -> tuple[tuple[str, tuple[float, float, float, float]], ...]:
    boxes = []
    for entry in given:
        colour, (left, top, right, bottom) = entry["colour"], entry["box"]
        inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if colour not in COLOURS or not inside:
            raise ValueError(f"a box is a colour of {', '.join(COLOURS)} and four px inside {size}: {entry}")
        boxes.append((colour, (left, top, right, bottom)))
    return tuple(boxes)


def _collect(files: list[Path], make: Callable[[dict[str, Any], Path], FileCase]) -> list[FileCase]:
    """A case from every line of JSON, or all faults at once."""
    cases: list[FileCase] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("needed is a JSON object")
                _keep(make(row, path), place, seen, cases)
            except (ValueError, TypeError, KeyError, OSError) as error:
                faults.append(f"{place}: {_words(error)}")
    return _checked(cases, faults, files[0])


def _each(path: Path, entries: dict[str, Any], make: Callable[[str, Any], FileCase]) -> list[FileCase]:
    """A case from every entry, or all faults at once with the line that names the entry."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cases: list[FileCase] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for key, entry in entries.items():
        number = next((n for n, line in enumerate(lines, start=1) if json.dumps(key) in line), 1)
        place = f"{path}, line {number}, entry {key!r}"
        try:
            _keep(make(key, entry), place, seen, cases)
        except (ValueError, TypeError, KeyError, OSError) as error:
            faults.append(f"{place}: {_words(error)}")
    return _checked(cases, faults, path)


def _keep(case: FileCase, place: str, seen: dict[str, str], cases: list[FileCase]) -> None:
    if not SAFE_ID.fullmatch(case.case_id):
        raise ValueError(f"the id {case.case_id!r} is no file name of letters, digits, '.', '_' and '-'")
    if case.case_id in seen:
        raise ValueError(f"the id {case.case_id!r} is that of {seen[case.case_id]} too")
    seen[case.case_id] = place
    cases.append(case)


def _checked(cases: list[FileCase], faults: list[str], path: Path) -> list[FileCase]:
    if faults:
        raise CaseFileError("\n".join(faults))
    if not cases:
        raise CaseFileError(f"{path}, line 1: there is no case in it")
    return cases


def _words(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _picture(folder: Path, row: dict[str, Any], name: str) -> Image.Image:
    return load_images(_inside(folder, _text(row, name)))[0]


def _inside(folder: Path, given: str) -> Path:
    path = (folder / given).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the path {given!r} leads out of {folder}")
    return path


def _mask(folder: Path, row: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    shown = _picture(folder, row, "mask")
    if shown.size != size:
        raise ValueError(f"the mask is {shown.size} px, its picture {size}")
    mask = np.asarray(shown.convert("L")) > 127
    if not mask.any():
        raise ValueError("the mask is black: paint white what may change")
    return mask


def _sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size != size:
        raise ValueError(f"the target is {picture.size} px, its picture {size}")
    return picture


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or (name != "expected_text" and not value.strip()):
        raise ValueError(f"{name} is a text, not {value!r}")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CaseFileError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(data, dict):
        raise CaseFileError(f"{path}, line 1: needed is a JSON object")
    return data
