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
from .ocr import ImageOrArray, pixels_of
from .text import edit_similarity

VISIBLE = 24  # grey levels in some channel: less is no change, but the codec's


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
    values = {
        "agrees_colour_off": colour_off(
            image, inside(taken, image.size), reference, inside(original, reference.size)
        )
    }
    if case.kind == "same_object":
        places = [found_places(shown, [original])[0] for shown in (image, reference)]
        apart = 1.0
        if None not in places:
            apart = float(np.hypot(*np.subtract(*places)) / image.width)
        values["agrees_place_off"] = min(apart, 1.0)
    return values


def colour_off(a: ImageOrArray, mask_a: np.ndarray, b: ImageOrArray, mask_b: np.ndarray) -> float:
    """CIEDE2000 between the mean CIELAB colours of two regions, masks bool (H, W).

    Sharma, Wu and Dalal 2005, by scikit-image. Raises ValueError where a mask is empty.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    if not (mask_a.any() and mask_b.any()):
        raise ValueError("a mask is False everywhere; needed: at least one pixel to compare")
    means = [rgb2lab(pixels_of(shown)[mask]).mean(0) for shown, mask in ((a, mask_a), (b, mask_b))]
    return float(deltaE_ciede2000(*means))


def edit_agreement(
    before_a: ImageOrArray, after_a: ImageOrArray, before_b: ImageOrArray, after_b: ImageOrArray
) -> EditAgreement | None:
    """Whether the same instruction did the same to two images, from what changed in each.

    Returns:
        None where one of the images did not change.

    Raises:
        ValueError: an edit of another size than its image.
    """
    changed = [_changed(*pair) for pair in ((before_a, after_a), (before_b, after_b))]
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
    for (_, prompt), alike in by_prompt.items():
        for first, second in itertools.pairwise(alike):
            for arm in dict.fromkeys(record["arm"] for record in records):
                pair = (edits.get((case.case_id, arm)) for case in (first, second))
                both = [record for record in pair if record is not None]
                if len(both) < 2:
                    continue
                after = [Image.open(folder / record["image"]) for record in both]
                agreed = edit_agreement(first.image, after[0], second.image, after[1])
                values = {} if agreed is None else agreed._asdict()
                agreements.append(
                    {
                        **both[0],
                        "key": f"{both[0]['key']}+{both[1]['key']}",
                        "level": "agreement",
                        "case_id": f"{first.case_id}+{second.case_id}",
                        "prompt": prompt,
                        "seconds": 0.0,
                        "metrics": {f"pair_{name}": round(value, 6) for name, value in values.items()},
                    }
                )
    return agreements


def inside(item: SceneObject, size: tuple[int, int]) -> np.ndarray:
    """The inner half of a shape, bool (H, W): its rim, and what little an edit misplaces, are left out."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    reach = 0.5 * np.linalg.norm(corners_of(item) - item.centre, axis=1).min()
    return np.hypot(x - item.centre[0], y - item.centre[1]) <= max(reach, 1.0)


def _bare(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Where a scene shows its background alone."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    free = np.ones(x.shape, bool)
    for item in scene.objects:
        free &= np.hypot(x - item.centre[0], y - item.centre[1]) > item.radius + 2
    for left, top, right, bottom in (block.box for block in scene.texts):
        free &= (x < left - 2) | (x > right + 2) | (y < top - 2) | (y > bottom + 2)
    return free


def _changed(before: ImageOrArray, after: ImageOrArray) -> np.ndarray:
    first, second = pixels_of(before), pixels_of(after)
    if first.shape != second.shape:
        raise ValueError(f"the edit is {second.shape}, its image {first.shape}; needed: the same size")
    return (np.abs(first.astype(int) - second) > VISIBLE).any(-1)
