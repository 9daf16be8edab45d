"""Consistency across images: does an edit agree with the image it was to follow, or with another edit?

`agreement` looks at one thing that a reference shows and the edit was to take over: its colour, words, place.
`edit_agreement` needs no truth: the same instruction on two images should do the same to both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...case import Case, Scene, SceneObject
from ...synthetic.questions import words_of
from ...synthetic.scene import corners_of
from .objects import found_places
from .ocr import ImageOrArray
from .pixels import colour_off as colour_off
from .pixels import disc, inside_box, visible_change
from .text import edit_similarity


class EditAgreement(NamedTuple):
    """How alike two edits of one instruction are."""

    colour_off: float
    """CIEDE2000 between the mean colours of what changed, as they are afterwards."""
    place_off: float
    """Distance of the middles of what changed, in sides of the images."""
    size_ratio: float
    """Changed share of the image that changed less, over that of the other: 1 for equal shares."""


def agreement(case: Case, image: Image.Image, read: str | None = None) -> dict[str, float]:
    """What an edit of a consistency case shares with its reference.

    Args:
        case: of `consistency`, with its scenes.
        image: the edit, RGB, of the case's size.
        read: what `ocr.read_text` gives for it, where the case is about words.

    Returns:
        `agrees_text` (`text.edit_similarity` with the reference's words), `agrees_colour_off` (CIEDE2000
        of the mean colours of both things, or both backgrounds) and `agrees_place_off` (distance of both
        middles in sides of the image, 1 where the thing is not found), each where the instruction asks it.
    """
    if case.edit is None or not case.edit.references:
        return {}
    model, after = case.edit.references[-1], case.edit.after
    reference = case.references[-1]
    if case.kind == "same_text":
        words = " ".join(block.text for block in words_of(model))
        return {} if read is None else {"agrees_text": edit_similarity(read, words)}
    if case.kind == "same_background":
        edited, shown = (_bare(scene, case.image.size) for scene in (after, model))
        return {"agrees_colour_off": colour_off(image, edited, reference, shown)}
    original = model.objects[0]
    taken = next(item for item in after.objects if item.name == original.name)
    edited, shown = inside(taken, image.size), inside(original, reference.size)
    values = {"agrees_colour_off": colour_off(image, edited, reference, shown)}
    if case.kind == "same_object":
        places = [found_places(seen, [original])[0] for seen in (image, reference)]
        apart = 1.0 if None in places else float(np.hypot(*np.subtract(*places)) / image.width)
        values["agrees_place_off"] = min(apart, 1.0)
    return values


def edit_agreement(
    before_a: ImageOrArray, after_a: ImageOrArray, before_b: ImageOrArray, after_b: ImageOrArray
) -> EditAgreement | None:
    """Whether the same instruction did the same to two images, from what changed in each.

    Returns:
        None where one of the images did not change.

    Raises:
        ValueError: an edit of another size than its image.
    """
    changed = [visible_change(*pair) for pair in ((before_a, after_a), (before_b, after_b))]
    if not all(mask.any() for mask in changed):
        return None
    middles = [(np.argwhere(mask).mean(0) + 0.5) / mask.shape for mask in changed]  # (down, right), 0 to 1
    shares = sorted(float(mask.mean()) for mask in changed)
    return EditAgreement(
        colour_off(after_a, changed[0], after_b, changed[1]),
        float(np.hypot(*(middles[0] - middles[1]))),
        shares[0] / shares[1],
    )


def pair_records(
    cases: Sequence[Case], records: Sequence[Mapping[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """A record for each two cases with one prompt, in every arm: `edit_agreement` of their images.

    Args:
        cases: those from files are paired, each with the next by id: their instructions mean the same
            wherever they are original.
        records: of the run, with the images that lie in `folder`.
    """
    edits = {(r["case_id"], r["arm"]): r for r in records if r["level"] == "edit" and not r["error"]}
    by_prompt: dict[tuple[str, str], list[Case]] = {}
    for case in sorted((case for case in cases if case.dataset), key=lambda case: case.case_id):
        by_prompt.setdefault((case.group, case.prompt), []).append(case)
    agreements = []
    pairs = [pair for alike in by_prompt.values() for pair in itertools.pairwise(alike)]
    arms = dict.fromkeys(record["arm"] for record in records)
    for (first, second), arm in itertools.product(pairs, arms):
        both = [edits[key] for case in (first, second) if (key := (case.case_id, arm)) in edits]
        if len(both) < 2:
            continue
        after = [Image.open(folder / record["image"]) for record in both]
        agreed = edit_agreement(first.image, after[0], second.image, after[1])
        values = {} if agreed is None else agreed._asdict()
        changes = {
            "key": f"{both[0]['key']}+{both[1]['key']}",
            "level": "agreement",
            "case_id": f"{first.case_id}+{second.case_id}",
            "prompt": first.prompt,
            "seconds": 0.0,
            "metrics": {f"pair_{name}": round(value, 6) for name, value in values.items()},
        }
        agreements.append({**both[0], **changes})
    return agreements


def inside(item: SceneObject, size: tuple[int, int]) -> np.ndarray:
    """The inner half of a shape, bool (H, W): its rim, and what little an edit misplaces, are left out."""
    reach = 0.5 * np.linalg.norm(corners_of(item) - item.centre, axis=1).min()
    return disc(item.centre, max(reach, 1.0), size)


def _bare(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Where a scene shows its background alone."""
    covered = [disc(item.centre, item.radius + 2, size) for item in scene.objects]
    covered += [inside_box(block.box, 2, size) for block in scene.texts]
    return ~np.logical_or.reduce([np.zeros((size[1], size[0]), bool), *covered])
