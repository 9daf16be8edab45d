"""Cases from a folder of the user's own, and what the readers of public benchmarks share.

Every fault is found before anything runs, and each is named with its file and line.

Own folder: `cases.jsonl`, one object a line with `id`, `image`, `prompt`, and where they are known `group`,
`difficulty`, `references` (images that come before `image` in the prompt), `target`, `mask` (white may
change), `source_text`, `expected_text` and `boxes` (`colour` of `scenes.COLOURS` and `box`, left, top, right,
bottom in px). Paths are relative to the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..case import OTHER, Box, Case
from ..images import load_images
from ..io import json_lines, parse_object, path_inside
from ..synthetic.scene import COLOURS

Row = TypeVar("Row")

FIELDS = {
    *("id", "image", "prompt", "group", "difficulty", "references"),
    *("target", "mask", "source_text", "expected_text", "boxes"),
}


def photo_cases(
    image: Image.Image,
    prompts: Mapping[str, Sequence[str]],
    area: int,
    references: Sequence[Image.Image] = (),
) -> list[Case]:
    """One image without any truth, with the prompts of each group.

    Args:
        image: the user's own.
        prompts: by group.
        area: px² of the editor's output: a larger image is reduced to it, since nothing finer comes back.
        references: images that come before it in the prompt.
    """
    shown, factor = image, (area / (image.width * image.height)) ** 0.5
    if factor < 1:
        shown = image.resize(tuple(max(round(side * factor), 1) for side in image.size))
    return [
        Case(
            f"photo-{group}-{number:02d}",
            group,
            "photo",
            prompt,
            shown,
            references=tuple(references),
            dataset="photo",
        )
        for group, several in prompts.items()
        for number, prompt in enumerate(several)
    ]


class CaseFileError(ValueError):
    """One or more faults in case files, a line each with file and line number."""


def load_folder(folder: str | Path) -> list[Case]:
    """The cases of a user's own folder.

    Raises:
        FileNotFoundError: no `cases.jsonl` there.
        CaseFileError: every fault in it.
    """
    path = required_file(Path(folder) / "cases.jsonl")
    return read_lines([path], lambda row, _: _own_case(path.parent, row))


def _own_case(folder: Path, row: dict[str, Any]) -> Case:
    if unknown := sorted(set(row) - FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(FIELDS))}")
    image, name, prompt = image_at(folder, row, "image"), text_of(row, "id"), text_of(row, "prompt")
    truth: dict[str, Any] = {}
    if "target" in row:
        truth["target"] = image_at(folder, row, "target")
    if "mask" in row:
        truth["edit_mask"] = np.asarray(image_at(folder, row, "mask").convert("L")) > 127
        if not truth["edit_mask"].any():
            raise ValueError("the mask is black: paint white what may change")
    truth |= {text: text_of(row, text) for text in ("source_text", "expected_text") if text in row}
    truth |= {"difficulty": row.get("difficulty", "easy"), "boxes": _boxes(row.get("boxes", []), image.size)}
    truth["references"] = _references(folder, row.get("references", []))
    return Case(name, row.get("group", OTHER), "own", prompt, image, **truth, dataset="own")


def _references(folder: Path, paths: object) -> tuple[Image.Image, ...]:
    if not isinstance(paths, list):
        raise ValueError(f"references is a list of image paths, not {paths!r}")
    return tuple(image_at(folder, {"references": path}, "references") for path in paths)


def _boxes(entries: Sequence[dict[str, Any]], size: tuple[int, int]) -> tuple[tuple[str, Box], ...]:
    boxes = []
    for entry in entries:
        colour, (left, top, right, bottom) = entry["colour"], entry["box"]
        inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if colour not in COLOURS or not inside:
            raise ValueError(f"a box is a colour of {', '.join(COLOURS)} and four px inside {size}: {entry}")
        boxes.append((colour, (left, top, right, bottom)))
    return tuple(boxes)


def read_cases(
    rows: Iterable[tuple[str, Row]], read: Callable[[Row], Case | None], source: Path
) -> list[Case]:
    """The cases of some rows, or all faults at once.

    Args:
        rows: each with its place, in words.
        read: gives a row's case; None where it was not asked for.

    Raises:
        CaseFileError: every fault, or no case at all in `source`.
    """
    cases: dict[str, Case] = {}
    places: dict[str, str] = {}
    faults: list[str] = []
    for place, row in rows:
        try:
            case = read(row)
            if case is None:
                continue
            name = case.case_id.casefold()  # some file systems do not tell cases apart
            if name in cases:
                raise ValueError(f"the id {case.case_id!r} is that of {places[name]} too")
            cases[name], places[name] = case, place
        except KeyError as error:
            faults.append(f"{place}: the field {error} is missing")
        except (ValueError, TypeError, OSError) as error:
            faults.append(f"{place}: {error}")
    if faults:
        raise CaseFileError("\n".join(faults))
    if not cases:
        raise CaseFileError(f"{source}, line 1: there is no case in it")
    return list(cases.values())


def read_lines(files: list[Path], read: Callable[[dict[str, Any], Path], Case | None]) -> list[Case]:
    """A case from every line of JSON, or all faults at once."""

    def read_line(line: tuple[Path, bytes]) -> Case | None:
        return read(parse_object(line[1], "the line"), line[0])

    lines = ((place, (path, line)) for path in files for place, line in json_lines(path))
    return read_cases(lines, read_line, files[0])


def image_at(folder: Path, row: dict[str, Any], name: str) -> Image.Image:
    return load_images(path_inside(folder, text_of(row, name)))[0]


def text_of(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or (name != "expected_text" and not value.strip()):
        raise ValueError(f"{name} is a text, not {value!r}")
    return value


def required_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path
