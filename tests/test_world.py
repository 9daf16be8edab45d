"""Claims about the synthetic pictures: reproducible, legible, and right about what a right edit changes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge import metrics, world


def bytes_of(cases: list[world.Case]) -> list[tuple]:
    return [
        (c.case_id, c.prompt, c.image.tobytes(), c.target.tobytes(), c.edit_mask.tobytes()) for c in cases
    ]


@pytest.fixture(scope="module")
def cases() -> list[world.Case]:
    """Every kind several times: 36 cases a group at 128 px."""
    return [case for group in world.GROUPS for case in world.make_cases(group, 36, seed=1)]


@pytest.mark.parametrize("group", world.GROUPS)
def test_same_seed_renders_the_same_bytes(group: str) -> None:
    first, second, other = (world.make_cases(group, 6, seed=seed) for seed in (5, 5, 6))
    assert bytes_of(first) == bytes_of(second)
    assert not {case.image.tobytes() for case in first} & {case.image.tobytes() for case in other}


@pytest.mark.parametrize("group", world.GROUPS)
def test_a_longer_list_begins_with_the_shorter_one(group: str) -> None:
    assert bytes_of(world.make_cases(group, 9))[:4] == bytes_of(world.make_cases(group, 4))


@pytest.mark.parametrize("group", world.GROUPS)
def test_another_size_shows_the_same_scenes(group: str) -> None:
    for small, large in zip(
        world.make_cases(group, 6, seed=2), world.make_cases(group, 6, seed=2, size=384), strict=True
    ):
        assert (small.prompt, small.expected_text) == (large.prompt, large.expected_text)
        for a, b in zip(small.expected_objects, large.expected_objects, strict=True):
            assert (a.kind, a.colour) == (b.kind, b.colour)
            assert np.allclose(np.multiply((*a.centre, a.radius), 3), (*b.centre, b.radius))
        shrunk = large.image.resize(small.image.size, Image.Resampling.BOX)
        assert metrics.mean_abs_difference(shrunk, small.image) < 4


def test_case_ids_are_unique_and_every_kind_comes_up(cases: list[world.Case]) -> None:
    assert len({case.case_id for case in cases}) == len(cases)
    assert {(case.group, case.kind) for case in cases} == {
        (group, kind) for group, kinds in world.KINDS.items() for kind in kinds
    }


def test_every_kind_of_edit_has_several_phrasings() -> None:
    kinds = {kind for kinds in world.KINDS.values() for kind in kinds}
    assert {"move" if kind.startswith("move_") else kind for kind in kinds} == set(world.PHRASINGS)
    assert all(len(set(variants)) >= 2 for variants in world.PHRASINGS.values())


def test_pixels_outside_the_edit_mask_are_identical_in_image_and_target(cases: list[world.Case]) -> None:
    for case in cases:
        differ = (np.asarray(case.image) != np.asarray(case.target)).any(axis=-1)
        assert differ.any(), case.case_id
        assert not (differ & ~case.edit_mask).any(), case.case_id


def test_local_edits_leave_most_of_the_picture_out_of_the_mask(cases: list[world.Case]) -> None:
    for case in cases:
        assert case.edit_mask.shape == (128, 128)
        assert case.edit_mask.dtype == bool
        if case.kind != "recolour_background":
            assert case.edit_mask.mean() < 0.3, case.case_id


def test_texts_before_and_after_fit_the_kind(cases: list[world.Case]) -> None:
    for case in cases:
        before, after = case.source_text, case.expected_text
        if case.kind == "change_text":
            assert before != after
            assert f'"{after}"' in case.prompt
        elif case.kind == "remove_text":
            assert (bool(before), after) == (True, "")
        elif case.kind == "replace_letter":
            assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        elif case.group == "space":
            assert (before, after) == (None, None)
        else:
            assert before == after


def test_replacing_a_letter_names_one_that_occurs_once(cases: list[world.Case]) -> None:
    for case in (case for case in cases if case.kind == "replace_letter"):
        old, new = case.prompt.split('"')[1::2]
        assert case.source_text.count(old) == 1
        assert case.source_text.replace(old, new) == case.expected_text


def test_a_moved_object_goes_to_the_named_place_and_the_others_stay(cases: list[world.Case]) -> None:
    for case in (case for case in cases if case.kind.startswith("move")):
        moved, *others = case.expected_objects
        x, y = np.array(moved.centre) / 128
        reached = {
            "move_left": x < 0.25,
            "move_right": x > 0.75,
            "move_top": y < 0.25,
            "move_bottom": y > 0.75,
            "move_centre": np.hypot(x - 0.5, y - 0.5) < 0.01,
        }
        assert reached[case.kind], case.case_id
        assert moved.name in case.prompt
        assert metrics.centroid_error(case.image, [moved]) > 0.3 * 128 - 1
        assert metrics.centroid_error(case.image, others) < 1


def test_a_name_means_one_object_only(cases: list[world.Case]) -> None:
    for case in cases:
        assert len({item.colour for item in case.expected_objects}) == len(case.expected_objects)


def test_shapes_are_drawn_around_their_centre_within_their_radius() -> None:
    blank = world.Scene(128, "marble", "grey", 0)
    for kind in world.SHAPES:
        item = world.SceneObject(kind, "red", (60.25, 70.75), 20.0)
        drawn = world.render(replace(blank, objects=(item,)))
        y, x = np.nonzero((np.asarray(drawn) != np.asarray(world.render(blank))).any(axis=-1))
        distance = np.hypot(x + 0.5 - 60.25, y + 0.5 - 70.75)
        assert 18.5 < distance.max() < 21.5, kind
        assert np.hypot(x.mean() + 0.5 - 60.25, y.mean() + 0.5 - 70.75) < 0.5, kind


@pytest.mark.parametrize("texture", world.TEXTURES)
@pytest.mark.parametrize("backdrop", ["grey", "navy"])
def test_a_texture_is_visible_and_no_object_is_found_in_it(texture: str, backdrop: str) -> None:
    for seed in range(3):
        picture = world.render(world.Scene(128, texture, backdrop, seed))
        assert np.asarray(picture).std(axis=(0, 1)).min() > 5
        assert metrics.find_objects(picture) == []


def test_no_word_is_clipped_by_the_border() -> None:
    """Words lie inside their mask (see the identity outside it), and no mask of a word touches the border."""
    for case in world.make_cases("ocr", 24, seed=3):
        assert not case.edit_mask[[0, -1]].any(), case.case_id
        assert not case.edit_mask[:, [0, -1]].any(), case.case_id


def test_ocr_reads_the_expected_word_in_target_pictures() -> None:
    """At least 11 of 12 at 128 px and 5 of 6 at 512 px; so few cases leave room for one misread letter."""
    for size, count, least in ((128, 18, 11), (512, 9, 5)):
        targets = [case for case in world.make_cases("ocr", count, seed=7, size=size) if case.expected_text]
        read = [metrics.exact_text(metrics.read_text(case.target), case.expected_text) for case in targets]
        assert sum(read) >= least, (size, sum(read), len(read))


def test_test_picture_shows_a_word_and_three_shapes() -> None:
    picture = world.sample_picture()
    assert (picture.size, picture.mode) == ((448, 448), "RGB")
    assert picture.tobytes() == world.sample_picture().tobytes()
    assert metrics.read_text(picture) in world.WORDS
    assert len(metrics.find_objects(picture)) == 3


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"group": "sound", "count": 1}, "sound"),
        ({"group": "ocr", "count": 0}, "0"),
        ({"group": "ocr", "count": 1, "size": 63}, "63"),
        ({"group": "ocr", "count": 1, "seed": -1}, "-1"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_needed(arguments: dict, given: str) -> None:
    with pytest.raises(ValueError, match=rf"{given}.*needed"):
        world.make_cases(**arguments)


def test_drawing_a_word_imports_neither_pyplot_nor_torch() -> None:
    lines = (
        "import sys; from qwen_vision_bridge import world; world.make_cases('ocr', 1)",
        "assert not {'matplotlib.pyplot', 'torch', 'skimage', 'scipy'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)
