"""Is an edit right? One yes or no an image, from the scenes that the case was drawn from.

What must be written is read, what must move is found, and everything else is compared over the pixels where
it shows: the asked change must be there, and what the scenes share must be left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ...case import Case, Edit, Scene, SceneObject, TextBlock
from ...synthetic.scene import COLOURS, render
from . import pixels as metrics
from .objects import find_objects, place_distances
from .ocr import read_text
from .text import exact_text, letters_of

# Kinds whose result is read, and kinds whose result is a background; the others show by their scenes.
WRITTEN = (
    *("change_text", "append_letter", "copy_text", "swap_words", "reverse_text", "replace_letter"),
    *("delete_vowels", "sort_letters", "double_letter", "spell_digit", "same_text"),
)
BACKGROUND = ("recolour_background", "same_background")
# Images are compared a little out of focus: 1 px of 128, against what codecs do to single pixels and rims.
FOCUS = 1 / 128
MISSING = 0.35  # share of a change, or of a thing that had to stay, that may be missing
COLOUR_OFF = 15.0  # CIEDE2000 from the wanted colour; two colours of shapes are farther apart
PLACE_OFF = 1 / 16  # of the side: 8 px of 128, less than half of the shortest move asked for
SCRAP = 0.25  # of a shape's area: a smaller patch of its colour is no second shape
BACKGROUND_OFF = 6.0  # CIEDE2000 of the background's mean colour
TEXTURE_KEPT = 0.8  # correlation of the background's luminance with the target's

Part = SceneObject | TextBlock


class Verdict(NamedTuple):
    """Whether an edit is right, and why not."""

    right: bool
    reason: str
    """"" where it is right."""
    judged_by: Literal["words", "places", "background", "regions"]
    """What the kind of instruction changes."""
    text_right: bool | None = None
    """Of words: whether they are right, whatever else is wrong."""


def judge(case: Case, image: Image.Image, reading: str | None = None) -> Verdict:
    """Whether an image is a right edit of the case.

    Args:
        case: with its scenes.
        image: RGB, of the target's size.
        reading: what `ocr.read_text` gives for the image, where that is known already.

    Raises:
        ValueError: a case without scenes, an image of another size.
    """
    edit, target = case.edit, case.target
    if edit is None or target is None:
        raise ValueError(f"case {case.case_id} has no scenes to judge by")
    if image.size != target.size:
        raise ValueError(f"the edit is {image.size} px, the case {case.case_id} is {target.size} px")
    if is_move(edit):
        reason = _misplaced(edit, target, image)
        return Verdict(not reason, reason, "places")
    if case.kind in WRITTEN:
        read = read_text(image) if reading is None else reading
        right = bool(exact_text(letters_of(read), case.expected_text or ""))
        misread = "" if right else f"it reads {read!r}, not {case.expected_text!r}"
        reason = misread or _damaged(edit, target, image)
        return Verdict(not reason, reason, "words", right)
    if case.kind in BACKGROUND:
        reason = _wrong_background(edit, target, image) or _damaged(edit, target, image)
        return Verdict(not reason, reason, "background")
    reason = _unchanged(edit, case.image, target, image) or _damaged(edit, target, image)
    return Verdict(not reason, reason, "regions")


def is_move(edit: Edit) -> bool:
    """Whether an edit moves shapes and does nothing else to them."""
    both = edit.before.objects, edit.after.objects
    looks = [Counter((o.kind, o.colour, o.radius, o.mark) for o in objects) for objects in both]
    return looks[0] == looks[1] and set(both[0]) != set(both[1])


# Each of the following says what is wrong, "" where nothing is.


def _misplaced(edit: Edit, target: Image.Image, image: Image.Image) -> str:
    """A shape that is lost or in the wrong place, or one too many."""
    expected = edit.after.objects
    for item, distance in zip(expected, place_distances(image, expected), strict=True):
        if distance is None:
            return f"the {item.name} is lost"
        if distance > PLACE_OFF * image.width:
            return f"the {item.name} is {distance:.0f} px from its place"
    return _surplus(edit, target, image)


def _surplus(edit: Edit, target: Image.Image, image: Image.Image) -> str:
    """A shape too many of a colour that the scene has."""
    areas = [(item, SCRAP * float(_flat(target, item).sum())) for item in edit.after.objects]
    for patch in find_objects(image, min_area=min(area for _, area in areas)):
        alike = [(item, area) for item, area in areas if item.colour == patch.colour]
        is_shape = patch.area >= min((area for _, area in alike), default=np.inf)
        # A wide letter cuts a square in two, so halves at a shape's own place are no second shape.
        if is_shape and all(
            np.hypot(*np.subtract(patch.centroid, item.centre)) > item.radius for item, _ in alike
        ):
            return f"there is a {patch.colour} shape too many"
    return ""


def _unchanged(edit: Edit, original: Image.Image, target: Image.Image, image: Image.Image) -> str:
    """A change that was asked for and does not show."""
    before, after = _parts(edit.before), _parts(edit.after)
    visible = metrics.visible_change(original, target)
    undone = max(
        _share(image, target, original, visible & _region(part, target.size))
        for part in set(before) ^ set(after)
    )
    return f"{undone:.0%} of the change is missing" if undone > MISSING else ""


def _damaged(edit: Edit, target: Image.Image, image: Image.Image) -> str:
    """Something that both scenes share and does not show as in the target, or a shape in another colour."""
    before = set(_parts(edit.before))
    parts = _parts(edit.after)
    shares = [(0.0, "")]
    for part in parts:
        if part in before:
            without = render(_scene(edit.after, [other for other in parts if other is not part]))
            visible = metrics.visible_change(without, target)
            if visible.any():  # a thing that another covers wholly cannot be lost
                shares.append((_share(image, target, without, visible), _name(part)))
    lost, name = max(shares)
    if lost > MISSING:
        return f"{lost:.0%} of {name} is gone"
    for item in edit.after.objects:
        inside = metrics.shrink(_flat(target, item), 1)
        off = metrics.colour_error(image, inside, COLOURS[item.colour])
        if off > COLOUR_OFF:
            return f"the {item.name} is {off:.0f} CIEDE2000 off its colour"
    return ""


def _wrong_background(edit: Edit, target: Image.Image, image: Image.Image) -> str:
    """A background of another colour, or without its texture."""
    from skimage.color import rgb2lab

    bare = np.asarray(render(_scene(edit.after, [])))
    # One px more than what is drawn: images are resized on their way, which smears edges.
    where = metrics.shrink((bare == np.asarray(target)).all(-1), 1)
    off = metrics.colour_off(image, where, target, where)
    if off > BACKGROUND_OFF:
        return f"the background is {off:.0f} CIEDE2000 off its colour"
    edited, wanted = (rgb2lab(np.asarray(shown))[where][:, 0] for shown in (image, target))  # (P,)
    plain = edited.std() == 0 or wanted.std() == 0  # a plain area has no texture to agree
    texture_kept = 0.0 if plain else float(np.corrcoef(edited, wanted)[0, 1])
    return f"the texture agrees by {texture_kept:.2f} only" if texture_kept < TEXTURE_KEPT else ""


def _parts(scene: Scene) -> list[Part]:
    """Shapes, plates and words one by one, in the order they are drawn: together they give the scene."""
    parts: list[Part] = list(scene.objects)
    for block in scene.texts:
        if block.plate is not None:
            parts.append(replace(block, text="", ink=(0, 0, 0)))  # a plate has no ink
        if block.text:
            parts.append(replace(block, plate=None))
    return parts


def _scene(scene: Scene, parts: list[Part]) -> Scene:
    """The scene's background with these parts."""
    objects = tuple(part for part in parts if isinstance(part, SceneObject))
    texts = tuple(part for part in parts if isinstance(part, TextBlock))
    return replace(scene, objects=objects, texts=texts)


def _name(part: Part) -> str:
    if isinstance(part, SceneObject):
        return f"the {part.name}"
    return f'the word "{part.text}"' if part.text else "the plate"


def _region(part: Part, size: tuple[int, int]) -> np.ndarray:
    """Where a part can be: its disc or its box, bool (H, W)."""
    if isinstance(part, SceneObject):
        return metrics.disc(part.centre, part.radius, size)
    return metrics.inside_box(part.box, 0, size)


def _flat(target: Image.Image, item: SceneObject) -> np.ndarray:
    """Where the target shows the bare colour of a shape, without rim and letter: bool (H, W)."""
    return (np.asarray(target) == COLOURS[item.colour]).all(-1) & _region(item, target.size)


def _share(image: Image.Image, wanted: Image.Image, unwanted: Image.Image, where: np.ndarray) -> float:
    """How far an image is from what is wanted, as a share of how far the unwanted image is: 0 is there."""
    blur = ImageFilter.GaussianBlur(FOCUS * wanted.width)
    seen, right, wrong = (shown.filter(blur) for shown in (image, wanted, unwanted))
    return metrics.mean_abs_difference(seen, right, where) / metrics.mean_abs_difference(wrong, right, where)
