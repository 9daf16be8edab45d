"""Claims about the synthetic images: reproducible, legible, and right about what a right edit changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vision_bridge.case import Case
from qwen_vision_bridge.evaluation.metrics import objects, ocr, text
from qwen_vision_bridge.evaluation.metrics import pixels as metrics
from qwen_vision_bridge.specs import MAX_SEED
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import instructions as edits
from qwen_vision_bridge.synthetic import questions, referring
from qwen_vision_bridge.synthetic import sampler as layout
from qwen_vision_bridge.synthetic import scene as scenes
from qwen_vision_bridge.synthetic.multilingual import language_cases

ALL = [(group, kind) for group in world.GROUPS for kind in world.KINDS[group]]
A_KIND = 6
CROWDED = (6, 15, 17, 18, 41, 55, 58, 99)  # their first draw leaves no room for all of three shapes
SEEDS = st.integers(0, MAX_SEED)
SIDES = st.sampled_from((64, 128, 384, 448))  # px: the least, the two families' and the condition image's


def bytes_of(cases: list[Case]) -> list[tuple]:
    return [
        (c.case_id, c.prompt, c.image.tobytes(), c.target.tobytes(), c.edit_mask.tobytes()) for c in cases
    ]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Every kind six times, at 128 px."""
    return [case for group, kind in ALL for case in world.make_cases(group, A_KIND, seed=1, kinds=(kind,))]


@pytest.fixture(scope="module")
def novel() -> list[Case]:
    """Every kind twice, of what is held out."""
    return [
        case
        for group, kind in ALL
        for case in world.make_cases(group, 2, seed=1, split="novel", kinds=(kind,))
    ]


def of(cases: list[Case], *kinds: str) -> list[Case]:
    return [case for case in cases if case.kind in kinds]


# --- drawing ---------------------------------------------------------------------------------------------


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
    count = len(world.KINDS[group])
    for small, large in zip(
        world.make_cases(group, count, seed=2), world.make_cases(group, count, seed=2, size=384), strict=True
    ):
        assert (small.prompt, small.edit.explicit_prompt, small.edit.answer) == (
            large.prompt,
            large.edit.explicit_prompt,
            large.edit.answer,
        )
        assert small.expected_text == large.expected_text
        for a, b in zip(small.expected_objects, large.expected_objects, strict=True):
            assert (a.kind, a.colour) == (b.kind, b.colour)
            assert np.allclose(np.multiply((*a.centre, a.radius), 3), (*b.centre, b.radius))
        shrunk = large.image.resize(small.image.size, Image.Resampling.BOX)
        assert metrics.mean_abs_difference(shrunk, small.image) < 6, small.case_id  # another scene: 20


def test_case_ids_are_unique_and_every_kind_comes_up() -> None:
    made = [c for group in world.GROUPS for c in world.make_cases(group, len(world.KINDS[group]))]
    assert len({case.case_id for case in made}) == len(made)
    assert [(case.group, case.kind) for case in made] == ALL
    for group in world.GROUPS:  # a short list has both difficulties
        assert {case.difficulty for case in made if case.group == group} == {"easy", "hard"}
        first, second = [case.difficulty for case in made if case.group == group][:2]
        assert first != second


def test_every_kind_is_asked_in_at_least_two_ways(cases: list[Case]) -> None:
    assert all(len(set(ways)) >= 2 for ways in edits.PHRASINGS.values())
    for _, kind in ALL:
        made = of(cases, kind)
        ways = edits.PHRASINGS.get(kind) or (edits.PHRASINGS["move"] if kind.startswith("move_") else None)
        if ways is None:  # a referring_target: what it asks to do has phrasings of its own
            ways = [
                way for act in ("move", "remove_object", "recolour_object") for way in edits.PHRASINGS[act]
            ]
        starts = {way.split("{")[0] for way in ways}
        used = {max((s for s in starts if case.prompt.startswith(s)), key=len) for case in made}
        assert len(used) >= 2, kind


def test_shapes_lie_around_their_centre_within_their_radius() -> None:
    blank = scenes.Scene(128, "marble", "grey", 0)
    for kind in scenes.SHAPES:
        item = scenes.SceneObject(kind, "red", (60.25, 70.75), 20.0)
        drawn = scenes.render(replace(blank, objects=(item,)))
        y, x = np.nonzero((np.asarray(drawn) != np.asarray(scenes.render(blank))).any(axis=-1))
        distance = np.hypot(x + 0.5 - 60.25, y + 0.5 - 70.75)
        assert 18.5 < distance.max() < 21.5, kind
        assert np.hypot(x.mean() + 0.5 - 60.25, y.mean() + 0.5 - 70.75) < 0.5, kind


@pytest.mark.parametrize("texture", scenes.TEXTURES)
@pytest.mark.parametrize("backdrop", ["grey", "navy"])
def test_a_texture_is_visible_and_no_object_is_found_in_it(texture: str, backdrop: str) -> None:
    for seed in range(3):
        image = scenes.render(scenes.Scene(128, texture, backdrop, seed))
        assert np.asarray(image).std(axis=(0, 1)).min() > 5
        assert objects.find_objects(image) == []


def test_drawing_a_word_imports_neither_pyplot_nor_torch() -> None:
    lines = (
        "import sys; from qwen_vision_bridge.synthetic.cases import make_cases; make_cases('ocr', 1)",
        "assert not {'matplotlib.pyplot', 'torch', 'skimage', 'scipy'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


def test_test_image_shows_a_word_and_three_shapes() -> None:
    image = world.sample_image()
    assert (image.size, image.mode) == ((448, 448), "RGB")
    assert image.tobytes() == world.sample_image().tobytes()
    assert ocr.read_text(image) in layout.WORDS
    assert len(objects.find_objects(image)) == 3


def first_draw(seed: int) -> scenes.Scene:
    return edits.sample_scene(layout.Draw(np.random.default_rng(seed), 128))


@pytest.mark.parametrize("seed", CROWDED)
def test_a_seed_whose_first_draw_has_no_room_draws_again(seed: int) -> None:
    with pytest.raises(layout.NoRoomError):
        first_draw(seed)
    drawn = world.sample_image(128, seed)
    assert len(objects.find_objects(drawn)) == 3
    assert drawn.tobytes() == world.sample_image(128, seed).tobytes()


def test_a_seed_whose_first_draw_has_room_keeps_its_scene() -> None:
    for seed in range(5):
        assert world.sample_image(128, seed).tobytes() == scenes.render(first_draw(seed)).tobytes()


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=SEEDS, size=SIDES)
@example(seed=6, size=448)
@example(seed=MAX_SEED, size=64)
def test_every_seed_draws_a_test_image(seed: int, size: int) -> None:
    assert world.sample_image(size, seed).size == (size, size)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=SEEDS, size=SIDES, made=st.sampled_from(ALL), split=st.sampled_from(world.SPLITS))
@example(seed=MAX_SEED, size=448, made=ALL[0], split="novel")
def test_every_seed_draws_a_case_of_every_kind(
    seed: int, size: int, made: tuple[str, str], split: str
) -> None:
    group, kind = made
    (case,) = world.make_cases(group, 1, seed, size, split, (kind,))
    assert case.image.size == case.target.size == (size, size)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=SEEDS, size=st.sampled_from((128, 448)))
def test_every_seed_draws_cases_in_every_script(seed: int, size: int) -> None:
    assert all(case.image.size == (size, size) for case in language_cases(4, seed, size)[0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: world.sample_image(64, seed),
        lambda seed: world.make_cases("ocr", 1, seed),
        lambda seed: language_cases(1, seed),
    ],
)
def test_other_seeds_are_refused_with_the_accepted_range(draw: Callable[[int], object]) -> None:
    for seed in (-1, MAX_SEED + 1, 2**64):
        with pytest.raises(ValueError, match=rf"seed is {seed}.*from 0 to {MAX_SEED}"):
            draw(seed)
    for strange in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="seed is a whole number"):
            draw(strange)


# --- what changes ----------------------------------------------------------------------------------------


def test_masks_hold_every_change_and_little_else(cases: list[Case]) -> None:
    for case in cases:
        differ = (np.asarray(case.image) != np.asarray(case.target)).any(axis=-1)
        assert (case.edit_mask.shape, case.edit_mask.dtype) == ((128, 128), bool)
        assert differ.any(), case.case_id
        assert not (differ & ~case.edit_mask).any(), case.case_id
        if "background" not in case.kind:
            assert case.edit_mask.mean() < 0.5, case.case_id  # two large words at most
        rows, columns = (np.flatnonzero(case.edit_mask.any(axis)) for axis in (1, 0))
        changed = [np.flatnonzero(differ.any(axis)) for axis in (1, 0)]
        if case.kind in ("recolour_object", "remove_object", "add_object", "same_object", "same_colour"):
            for mask, seen in ((rows, changed[0]), (columns, changed[1])):  # a disc around a slim diamond
                assert mask[-1] - mask[0] <= 1.6 * (seen[-1] - seen[0]) + 8, case.case_id


def test_no_word_is_clipped_by_the_border(cases: list[Case]) -> None:
    """Every box lies inside the image, and its word inside the box."""
    for case in cases:
        for block in (*case.edit.before.texts, *case.edit.after.texts):
            left, top, right, bottom = block.box
            assert min(left, top, 128 - right, 128 - bottom) >= 0, case.case_id
            assert scenes.text_width([block.text or "I"], block.font, block.font_px) <= right - left


@pytest.mark.slow
def test_texts_after_follow_from_the_texts_before(cases: list[Case]) -> None:
    rules = {
        "reverse_text": lambda word: word[::-1],
        "sort_letters": lambda word: "".join(sorted(word)),
        "delete_vowels": lambda word: word.translate(str.maketrans("", "", "AEIOU")),
        "double_letter": lambda word: word + word[-1],
        "spell_digit": lambda word: edits.DIGITS[int(word) - 1],
        "copy_text": lambda word: f"{word} {word}",
        "swap_words": lambda words: " ".join(words.split()[::-1]),
        "remove_text": lambda word: "",
    }
    for kind, rule in rules.items():
        for case in of(cases, kind):
            assert case.expected_text == rule(case.source_text) != case.source_text, case.case_id
    for case in of(cases, "replace_letter", "append_letter"):
        named = case.prompt.split('"')[1::2]
        if case.kind == "append_letter":
            assert case.expected_text == case.source_text + named[0]
        else:
            assert case.source_text.count(named[0]) == 1
            assert case.source_text.replace(*named) == case.expected_text
    for case in of(cases, "change_text"):
        assert f'"{case.expected_text}"' in case.prompt
    for case in of(cases, "same_text"):
        assert text.exact_text(ocr.read_text(case.references[0]), case.expected_text) == 1


def test_a_moved_object_goes_to_its_place_and_others_stay(cases: list[Case]) -> None:
    reached = {
        "move_left": lambda x, y: x < 0.25,
        "move_right": lambda x, y: x > 0.75,
        "move_top": lambda x, y: y < 0.25,
        "move_bottom": lambda x, y: y > 0.75,
        "move_centre": lambda x, y: np.hypot(x - 0.5, y - 0.5) < 0.01,
        "move_corner": lambda x, y: min(abs(x - 0.5), abs(y - 0.5)) > 0.3,
    }
    for case in of(cases, *reached):
        moved, *others = case.expected_objects
        assert reached[case.kind](*np.array(moved.centre) / 128), case.case_id
        assert moved.name in case.prompt
        assert objects.centroid_error(case.image, [moved]) > 0.3 * 128 - 1
        assert objects.centroid_error(case.image, others) < 1


# --- what is asked ---------------------------------------------------------------------------------------


def test_a_hard_prompt_does_not_give_away_what_only_seeing_tells(cases: list[Case]) -> None:
    for case in cases:
        assert (case.edit.explicit_prompt is None) == (case.difficulty == "easy"), case.case_id
        if case.difficulty == "easy":
            continue
        assert case.edit.explicit_prompt != case.prompt
        prompt = case.prompt.lower()
        if case.kind in referring._REFERRING_TARGETS:
            meant = case.edit.before.objects[0]
            assert meant.colour not in prompt.split(), case.case_id
            assert meant.kind not in prompt.split(), case.case_id
        elif case.kind in world.REFERRING_WORDS:
            assert not any(place in prompt for places in referring.ROWS.values() for place in places)
        elif case.kind in ("match_colour", "same_colour"):
            assert case.expected_objects[0].colour not in prompt, case.case_id
        elif case.kind == "same_background":
            assert case.edit.after.backdrop not in prompt
        elif case.kind == "keep_object":
            assert not any(item.name in prompt for item in case.edit.before.objects[1:])
        else:
            assert case.expected_text.lower() not in prompt, case.case_id


def test_the_explicit_prompt_names_exactly_what_is_meant(cases: list[Case]) -> None:
    for case in of(cases, *referring._REFERRING_TARGETS):
        first, *others = case.edit.before.objects
        assert first.name in case.edit.explicit_prompt, case.case_id
        assert not any(item.name == first.name for item in others)
    for case in of(cases, *world.REFERRING_WORDS):
        words = questions.words_of(case.edit.before)
        meant = next(i for i, block in enumerate(words) if f'"{block.text}"' in case.prompt)
        assert referring.ROWS[len(words)][meant] in case.edit.explicit_prompt, case.case_id
    for case in of(cases, "same_text", "sort_letters", "spell_digit", "replace_letter", "reverse_text"):
        assert f'"{case.expected_text}"' in case.edit.explicit_prompt, case.case_id
    for case in of(cases, "match_colour", "same_colour"):
        assert case.expected_objects[0].colour in case.edit.explicit_prompt, case.case_id
    for case in of(cases, "same_background"):
        assert case.edit.after.backdrop in case.edit.explicit_prompt
    for case in of(cases, "keep_object"):
        assert all(item.name in case.edit.explicit_prompt for item in case.edit.before.objects[1:])


def test_what_is_described_is_true_of_one_thing_alone(cases: list[Case]) -> None:
    for case in of(cases, "size", "outermost", "odd_colour"):
        first, *others = case.edit.before.objects
        if case.kind == "size":
            sign = 1 if "smallest" in case.prompt else -1
            assert all(sign * first.radius < sign * item.radius for item in others)
        elif case.kind == "odd_colour":
            assert len({item.colour for item in others}) == 1
            assert first.colour != others[0].colour
        else:  # not only its centre: its tips reach farthest too
            sides = {"leftmost": (0, 1), "rightmost": (0, -1), "highest": (1, 1), "lowest": (1, -1)}
            axis, sign = next(side for name, side in sides.items() if name in case.prompt)
            reach = [(sign * scenes.corners_of(item)[:, axis]).min() for item in (first, *others)]
            assert min(reach[1:]) > reach[0], case.case_id


def test_near_misses_are_present(cases: list[Case]) -> None:
    close = []
    for case in of(cases, *world.REFERRING_WORDS):
        named, others = case.prompt.split('"')[1], [b.text for b in questions.words_of(case.edit.before)]
        one_off = [w for w in others if len(w) == len(named) and sum(map(str.__ne__, w, named)) == 1]
        close.append(bool(one_off))
    assert np.mean(close) > 0.5
    for case in of(cases, "size"):
        first, *others = case.edit.before.objects
        ratios = [min(first.radius, item.radius) / max(first.radius, item.radius) for item in others]
        assert 0.7 < max(ratios) < 0.95, case.case_id
    for case in of(cases, "outermost"):
        first, *others = case.edit.before.objects
        axis = 1 if "highest" in case.prompt or "lowest" in case.prompt else 0
        assert min(abs(first.centre[axis] - item.centre[axis]) for item in others) < 0.12 * 128


def test_a_name_means_one_object_only(cases: list[Case]) -> None:
    for case in cases:
        for scene in (case.edit.before, case.edit.after):
            assert len({item.name for item in scene.objects}) == len(scene.objects), case.case_id


def test_answers_give_the_squares_of_what_is_meant(cases: list[Case]) -> None:
    for case in (c for c in cases if c.kind in referring._REFERRING_TARGETS or c.kind == "remove_object"):
        first = case.edit.before.objects[0]
        column, row = ("abcdefgh".index(letter) for letter in case.edit.answer[:2])
        assert case.edit.answer[2:] == f" {first.name}"
        for index, value in ((column, first.centre[0]), (row, first.centre[1])):
            assert 16 * index <= value <= 16 * (index + 1), case.case_id
    for case in of(cases, *world.REFERRING_WORDS):
        meant = next(b for b in case.edit.before.texts if f'"{b.text}"' in case.prompt)
        column, row = ("abcdefgh".index(letter) for letter in case.edit.answer[:2])
        assert (column, row) == tuple(int(value // 16) for value in meant.centre)


def test_questions_are_answered_by_the_scene(cases: list[Case]) -> None:
    for case in cases[::5]:
        scene = case.edit.before
        assert questions.read_question(scene)[1].split("/") == (case.source_text or "nothing").split()
        _, described = questions.describe_question(scene)
        assert all(item.name in described for item in scene.objects)
        assert described.startswith(f"{scene.texture} {scene.backdrop};")
        kinds = {questions.ask(scene, np.random.default_rng(seed))[0].split()[0] for seed in range(40)}
        assert {"What", "Where", "Describe"} <= kinds


# --- splits ----------------------------------------------------------------------------------------------


def test_novel_scenes_are_made_of_what_no_other_split_has(cases: list[Case], novel: list[Case]) -> None:
    for case in novel:
        assert layout.is_held_out(case.edit.before), case.case_id
        assert layout.PAIR_BACKDROPS[case.edit.before.texture] == case.edit.before.backdrop
    known = [c for split in ("train", "validation") for c in world.make_cases("ocr", 20, split=split)]
    for case in (*cases, *known):
        for scene in (case.edit.before, case.edit.after, *case.edit.references):
            assert not layout.is_held_out(scene), case.case_id


def test_splits_share_no_image() -> None:
    made = [{c.image.tobytes() for c in world.make_cases("detail", 12, split=s)} for s in world.SPLITS]
    assert len(set.union(*made)) == sum(map(len, made))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"group": "sound", "count": 1}, "sound"),
        ({"group": "ocr", "count": 0}, "0"),
        ({"group": "ocr", "count": 1, "size": 63}, "63"),
        ({"group": "ocr", "count": 1, "seed": -1}, "-1"),
        ({"group": "ocr", "count": 1, "split": "holdout"}, "holdout"),
        ({"group": "ocr", "count": 1, "kinds": ("swap",)}, "swap"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_needed(arguments: dict, given: str) -> None:
    with pytest.raises(ValueError, match=rf"{given}.*needed"):
        world.make_cases(**arguments)
