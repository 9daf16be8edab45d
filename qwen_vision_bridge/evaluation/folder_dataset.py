"""Cases from a folder of the user's own, and what the readers of public benchmarks share.

Every fault is found before anything runs, and each is named with its file and line.

Own folder: `cases.jsonl`, one object a line with `id`, `image`, `prompt`, and where they are known `group`,
`difficulty`, `target`, `mask` (white may change), `source_text`, `expected_text` and `boxes` (`colour` of
`scenes.COLOURS` and `box`, left, top, right, bottom in px). Paths are relative to the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..images import load_images
from ..synthetic.cases import GROUPS
from ..synthetic.scene import COLOURS

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
    """Whether the image says more than the text that is to change."""
    references: tuple[Image.Image, ...] = ()
    benchmark: str = ""
    """`textedit`, `pie` or `gedit`, whose own metrics it then gets too."""

    @property
    def images(self) -> list[Image.Image]:
        """All images of the prompt."""
        return [*self.references, self.image]


def photo_cases(image: Image.Image, prompts: Mapping[str, Sequence[str]], area: int) -> list[FileCase]:
    """One image without any truth, with the prompts of each group.

    Args:
        image: the user's own.
        prompts: by group.
        area: px² of the editor's output: a larger image is reduced to it, since nothing finer comes back.
    """
    shown, factor = image, (area / (image.width * image.height)) ** 0.5
    if factor < 1:
        shown = image.resize(tuple(max(round(side * factor), 1) for side in image.size))
    return [
        FileCase(f"photo-{group}-{number:02d}", group, "photo", prompt, shown)
        for group, several in prompts.items()
        for number, prompt in enumerate(several)
    ]


class CaseFileError(ValueError):
    """One or more faults in case files, a line each with file and line number."""


def load_folder(folder: str | Path) -> list[FileCase]:
    """The cases of a user's own folder.

    Raises:
        FileNotFoundError: no `cases.jsonl` there.
        CaseFileError: every fault in it.
    """
    path = existing(Path(folder) / "cases.jsonl")
    return collect([path], lambda row, where: _own_case(path.parent, row, where))


def _own_case(folder: Path, row: dict[str, Any], _where: Path) -> FileCase:
    if unknown := sorted(set(row) - FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(FIELDS))}")
    group, difficulty = row.get("group", OTHER), row.get("difficulty", "easy")
    if group not in (*GROUPS, OTHER) or difficulty not in ("easy", "hard"):
        raise ValueError(f"group is one of {', '.join((*GROUPS, OTHER))}, difficulty easy or hard")
    image = image_at(folder, row, "image")
    target = sized(image_at(folder, row, "target"), image.size) if "target" in row else None
    mask = _mask(folder, row, image.size) if "mask" in row else None
    texts = [text_of(row, name) if name in row else None for name in ("source_text", "expected_text")]
    return FileCase(
        text_of(row, "id"),
        group,
        "own",
        text_of(row, "prompt"),
        image,
        target,
        mask,
        *texts,
        boxes=_boxes(row.get("boxes", []), image.size),
        difficulty=difficulty,
    )


def _boxes(given: Any, size: tuple[int, int]) -> tuple[tuple[str, tuple[float, float, float, float]], ...]:
    boxes = []
    for entry in given:
        colour, (left, top, right, bottom) = entry["colour"], entry["box"]
        inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if colour not in COLOURS or not inside:
            raise ValueError(f"a box is a colour of {', '.join(COLOURS)} and four px inside {size}: {entry}")
        boxes.append((colour, (left, top, right, bottom)))
    return tuple(boxes)


Makers = Iterable[tuple[str, Callable[[], FileCase | None]]]
"""Where a case is from, in words, and what makes it; None is no case of those that are asked for."""


def gather(makers: Makers, source: Path) -> list[FileCase]:
    """The cases, or all faults at once.

    Raises:
        CaseFileError: every fault, or no case at all in `source`.
    """
    cases: list[FileCase] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for place, make in makers:
        try:
            case = make()
            if case is not None:
                _keep(case, place, seen, cases)
        except (ValueError, TypeError, KeyError, OSError) as error:
            faults.append(f"{place}: {_words(error)}")
    if faults:
        raise CaseFileError("\n".join(faults))
    if not cases:
        raise CaseFileError(f"{source}, line 1: there is no case in it")
    return cases


def collect(files: list[Path], make: Callable[[dict[str, Any], Path], FileCase | None]) -> list[FileCase]:
    """A case from every line of JSON, or all faults at once."""

    def one(line: str, path: Path) -> FileCase | None:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("needed is a JSON object")
        return make(row, path)

    lines = (
        (f"{path}, line {number}", partial(one, line, path))
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line.strip()
    )
    return gather(lines, files[0])


def each(path: Path, entries: dict[str, Any], make: Callable[[str, Any], FileCase]) -> list[FileCase]:
    """A case from every entry, or all faults at once with the line that names the entry."""
    lines = path.read_text(encoding="utf-8").splitlines()

    def place(key: str) -> str:
        number = next((n for n, line in enumerate(lines, start=1) if json.dumps(key) in line), 1)
        return f"{path}, line {number}, entry {key!r}"

    return gather(((place(key), partial(make, key, entry)) for key, entry in entries.items()), path)


def _keep(case: FileCase, place: str, seen: dict[str, str], cases: list[FileCase]) -> None:
    if not SAFE_ID.fullmatch(case.case_id):
        raise ValueError(f"the id {case.case_id!r} is no file name of letters, digits, '.', '_' and '-'")
    if case.case_id in seen:
        raise ValueError(f"the id {case.case_id!r} is that of {seen[case.case_id]} too")
    seen[case.case_id] = place
    cases.append(case)


def _words(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def image_at(folder: Path, row: dict[str, Any], name: str) -> Image.Image:
    return load_images(_inside(folder, text_of(row, name)))[0]


def _inside(folder: Path, given: str) -> Path:
    path = (folder / given).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the path {given!r} leads out of {folder}")
    return path


def _mask(folder: Path, row: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    shown = image_at(folder, row, "mask")
    if shown.size != size:
        raise ValueError(f"the mask is {shown.size} px, its image {size}")
    mask = np.asarray(shown.convert("L")) > 127
    if not mask.any():
        raise ValueError("the mask is black: paint white what may change")
    return mask


def sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size != size:
        raise ValueError(f"the target is {image.size} px, its image {size}")
    return image


def text_of(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or (name != "expected_text" and not value.strip()):
        raise ValueError(f"{name} is a text, not {value!r}")
    return value


def existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CaseFileError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(data, dict):
        raise CaseFileError(f"{path}, line 1: needed is a JSON object")
    return data
