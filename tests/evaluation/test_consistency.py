"""Consistency across images and overlap by object, by values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.case import Case, SceneObject
from qwen_vision_bridge.evaluation.metrics.consistency import (
    agreement,
    colour_off,
    edit_agreement,
    inside,
    pair_records,
)
from qwen_vision_bridge.evaluation.metrics.objects import iou_by_object
from qwen_vision_bridge.evaluation.scoring import measure
from qwen_vision_bridge.synthetic.cases import make_cases
from qwen_vision_bridge.synthetic.scene import COLOURS

GREY = (128, 128, 128)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (100, 100)) -> np.ndarray:
    return np.full((size[1], size[0], 3), colour, np.uint8)


def with_box(colour: tuple[int, int, int], left: int, top: int, width: int, height: int) -> np.ndarray:
    image = flat(GREY)
    image[top : top + height, left : left + width] = colour
    return image


def test_colours_of_two_regions_differ_by_ciede2000() -> None:
    """Black and white are 100 apart; the mean of half black and half white, CIELAB, is L = 50."""
    whole = np.ones((100, 100), bool)
    assert colour_off(flat((0, 0, 0)), whole, flat((255, 255, 255)), whole) == pytest.approx(100, abs=0.01)
    assert colour_off(flat(GREY), whole, flat(GREY), whole) == 0
    half = flat((0, 0, 0))
    half[:50] = 255
    lightness_50 = flat((119, 119, 119))  # L = 50.03
    assert colour_off(half, whole, lightness_50, whole) == pytest.approx(0, abs=0.1)
    with pytest.raises(ValueError, match="a mask is False everywhere"):
        colour_off(half, ~whole, half, whole)


def test_equal_edits_agree_in_colour_place_and_size() -> None:
    red, blue = COLOURS["red"], COLOURS["blue"]
    before = flat(GREY)
    same = edit_agreement(before, with_box(red, 10, 20, 20, 20), before, with_box(red, 10, 20, 20, 20))
    assert same == pytest.approx((0, 0, 1))
    # 30 px right and 40 px down of 100: half a side; 10 × 20 of 20 × 20 px: half the size.
    moved = edit_agreement(before, with_box(red, 10, 20, 20, 20), before, with_box(red, 45, 60, 10, 20))
    assert moved.place_off == pytest.approx(0.5)
    assert moved.size_ratio == pytest.approx(0.5)
    assert moved.colour_off == pytest.approx(0)
    other = edit_agreement(before, with_box(red, 10, 20, 20, 20), before, with_box(blue, 10, 20, 20, 20))
    assert other.colour_off > 30
    assert edit_agreement(before, before, before, with_box(red, 0, 0, 9, 9)) is None
    with pytest.raises(ValueError, match="needed: the same size"):
        edit_agreement(before, flat(GREY, (50, 50)), before, before)


def test_one_prompt_on_several_images_is_compared_in_every_arm(tmp_path: Path) -> None:
    red, plain = COLOURS["red"], Image.fromarray(flat(GREY))
    cases = [
        Case(name, "other", "own", prompt, plain, dataset="own")
        for name, prompt in (("a", "paint"), ("b", "paint"), ("c", "other"), ("d", "paint"))
    ]
    records = []
    for case, left in zip(cases, (10, 40, 0, 10), strict=True):
        for arm in ("baseline", "bridge"):
            box = with_box(red, left if arm == "baseline" else 10, 10, 20, 20)
            Image.fromarray(box).save(tmp_path / f"{case.case_id}{arm}.png")
            records.append(
                {
                    "key": case.case_id + arm,
                    "level": "edit",
                    "case_id": case.case_id,
                    "arm": arm,
                    "error": None,
                    "image": f"{case.case_id}{arm}.png",
                }
            )
    records[-1]["error"] = "lost"
    found = {(r["case_id"], r["arm"]): r["metrics"] for r in pair_records(cases, records, tmp_path)}
    assert found.keys() == {("a+b", "baseline"), ("a+b", "bridge"), ("b+d", "baseline")}
    assert found["a+b", "baseline"]["pair_place_off"] == pytest.approx(0.3)
    assert found["a+b", "bridge"]["pair_place_off"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same_object", "same_colour", "same_background", "same_text"])
def test_only_a_right_edit_agrees_with_its_reference(kind: str) -> None:
    asked = {
        "same_object": {"agrees_colour_off", "agrees_place_off"},
        "same_text": {"agrees_text"},
        "same_colour": {"agrees_colour_off"},
        "same_background": {"agrees_colour_off"},
    }[kind]
    for case in make_cases("consistency", 3, seed=2, kinds=(kind,)):
        right, untouched = measure(case, case.target), measure(case, case.image)
        assert {name for name in right if name.startswith("agrees")} == asked
        if "agrees_text" in asked:
            assert right["agrees_text"] == 1 > untouched["agrees_text"]
        else:
            assert right["agrees_colour_off"] < 4 < untouched["agrees_colour_off"], case.case_id
        if kind == "same_object":
            assert right["agrees_place_off"] < 0.02
            assert untouched["agrees_place_off"] > 0.05 or untouched["agrees_place_off"] == 1


def test_agreement_is_measured_on_the_images() -> None:
    (case,) = make_cases("consistency", 1, kinds=("same_colour",))
    item = next(o for o in case.edit.after.objects if o.colour == case.edit.references[0].objects[0].colour)
    painted = np.asarray(case.target).copy()
    painted[inside(item, case.image.size)] = (0, 0, 0)
    expected = colour_off(
        flat((0, 0, 0)), np.ones((100, 100), bool), flat(COLOURS[item.colour]), np.ones((100, 100), bool)
    )
    assert agreement(case, Image.fromarray(painted))["agrees_colour_off"] == pytest.approx(expected, abs=0.5)


@pytest.mark.slow
def test_every_right_edit_of_shapes_covers_its_objects_wholly() -> None:
    for group in ("space", "detail", "consistency"):
        for case in make_cases(group, 4, seed=6):
            if case.expected_objects:
                assert measure(case, case.target)["iou_by_object"] == 1, case.case_id


def test_overlap_by_object_is_the_mean_of_each_objects_own() -> None:
    """Two red boxes of 20 × 20: one is where it should be, one half beside, 200 of 600 px in common."""
    red = COLOURS["red"]
    items = [SceneObject("square", "red", (20, 20), 14), SceneObject("square", "red", (70, 70), 14)]
    target = with_box(red, 10, 10, 20, 20)
    target[60:80, 60:80] = red
    image = with_box(red, 10, 10, 20, 20)
    image[60:80, 70:90] = red
    assert iou_by_object(image, target, items) == pytest.approx((1 + 200 / 600) / 2)
    assert iou_by_object(target, target, items) == 1
    assert iou_by_object(with_box(red, 10, 10, 20, 20), target, items) == 0.5  # one is lost
    assert iou_by_object(flat(GREY), target, items) == 0
    lettered = target.copy()
    lettered[18:22, 18:22] = 0  # a letter on an object is no hole in it
    assert iou_by_object(lettered, target, items) == 1
    with pytest.raises(ValueError, match="expected_objects is empty"):
        iou_by_object(target, target, [])
