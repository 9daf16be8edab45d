"""The judge calls the right edit right, also as a JPEG, and everything else wrong, with a reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from PIL import Image, ImageFilter

from qwen_vision_bridge.case import Case, Scene, SceneObject, TextBlock
from qwen_vision_bridge.evaluation.metrics import correctness as judging
from qwen_vision_bridge.evaluation.metrics.correctness import judge
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import referring
from qwen_vision_bridge.synthetic.instructions import retext
from qwen_vision_bridge.synthetic.scene import COLOURS, render

ALL = [(group, kind) for group in world.GROUPS for kind in world.KINDS[group]]


def made(group: str, kind: str, count: int, split: str = "test", seed: int = 41) -> list[Case]:
    return world.make_cases(group, count, seed, split=split, kinds=(kind,))


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.7))


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """One case a kind."""
    return [case for group, kind in ALL for case in made(group, kind, 1)]


def test_every_kind_is_judged_by_what_it_changes(cases: list[Case]) -> None:
    for case in cases:
        verdict = judge(case, case.target, reading=case.expected_text)
        assert verdict.right, (case.case_id, verdict.reason)
        by = "words" if case.kind in judging.WRITTEN else "regions"
        by = "background" if case.kind in judging.BACKGROUND else by
        by = "places" if case.group == "space" and judging.is_move(case.edit) else by
        assert verdict.judged_by == by
        assert (verdict.text_right is not None) == (by == "words")


@pytest.mark.slow
def test_right_edits_of_held_out_scenes_are_right() -> None:
    for group, kind in ALL:
        for case in made(group, kind, 1, "novel"):
            verdict = judge(case, case.target)
            assert verdict.right, (case.case_id, verdict.reason)


@pytest.mark.slow
def test_an_edit_that_did_nothing_is_wrong(cases: list[Case]) -> None:
    for case in cases:
        verdict = judge(case, case.image)
        assert not verdict.right, case.case_id
        assert verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("degrade", [jpeg, blurred])
def test_right_edits_stay_right_through_codecs_and_blur(
    degrade: Callable[[Image.Image], Image.Image], cases: list[Case]
) -> None:
    wrong = [(c.case_id, v.reason) for c in cases[::2] if not (v := judge(c, degrade(c.target))).right]
    assert len(wrong) <= len(cases[::2]) // 10, wrong


# --- the right thing done to the wrong one ---------------------------------------------------------------


def to_another_word(case: Case) -> Scene:
    """The same done to another word."""
    before, after = case.edit.before, case.edit.after
    chosen, other, *rest = before.texts
    if case.kind == "remove_word":
        texts = (chosen, replace(other, text=""), *rest)
    elif case.kind == "recolour_word":
        texts = (chosen, replace(other, ink=after.texts[0].ink), *rest)
    else:
        texts = (replace(chosen, text=""), other, *(replace(block, text="") for block in rest))
    return replace(before, texts=texts)


def to_another_shape(case: Case) -> Scene:
    """The same done to another shape."""
    before, after = case.edit.before, case.edit.after
    chosen, other, *rest = before.objects
    labels = before.texts
    if judging.is_move(case.edit):
        shift = [there - here for here, there in zip(other.centre, after.objects[0].centre, strict=True)]
        other = replace(other, centre=after.objects[0].centre)
        if labels:
            left, top, right, bottom = labels[1].box
            box = (left + shift[0], top + shift[1], right + shift[0], bottom + shift[1])
            labels = (labels[0], replace(labels[1], box=box), *labels[2:])
    elif len(after.objects) < len(before.objects):
        return replace(before, objects=(chosen, *rest), texts=labels[:1] + labels[2:])
    else:
        other = replace(other, colour=after.objects[0].colour)
    return replace(before, objects=(chosen, other, *rest), texts=labels)


@pytest.mark.parametrize("kind", [*world.REFERRING_WORDS, *referring._REFERRING_TARGETS])
def test_the_same_done_to_another_is_wrong(kind: str) -> None:
    words = kind in world.REFERRING_WORDS
    for case in made("ocr" if words else "space", kind, 6):
        scene = (to_another_word if words else to_another_shape)(case)
        verdict = judge(case, render(scene))
        assert not verdict.right, case.case_id


# --- planted faults --------------------------------------------------------------------------------------


def test_an_object_12_px_off_is_wrong_and_4_px_off_is_right() -> None:
    for case in made("space", "move_left", 3):
        moved, *others = case.edit.after.objects
        for step, right in ((4, True), (12, False)):
            away = replace(moved, centre=(moved.centre[0], moved.centre[1] - step))
            verdict = judge(case, render(replace(case.edit.after, objects=(away, *others))))
            assert verdict.right == right, case.case_id
            assert right or f"{moved.name} is 12 px" in verdict.reason


def test_a_lost_or_a_surplus_object_is_wrong() -> None:
    blank = Scene(128, "waves", "grey", 3)
    objects = (SceneObject("circle", "red", (30, 30), 13), SceneObject("star", "blue", (95, 90), 13))
    for case in made("space", "swap", 2):
        after = case.edit.after
        lost = judge(case, render(replace(after, objects=after.objects[:-1])))
        assert lost.reason == f"the {after.objects[-1].name} is lost"
    case = replace_case(made("space", "move_left", 1)[0], replace(blank, objects=objects))
    assert judge(case, case.target).right
    third = replace(objects[0], centre=(95, 30))
    assert "a red shape too many" in judge(case, render(replace(blank, objects=(*objects, third)))).reason
    scrap = replace(third, radius=5)
    assert judge(case, render(replace(blank, objects=(*objects, scrap)))).right


def replace_case(case: Case, after: Scene) -> Case:
    """The case with another scene after, the first of whose shapes was moved there."""
    first, *rest = after.objects
    before = replace(after, objects=(replace(first, centre=(60, 100)), *rest))
    edit = replace(case.edit, before=before, after=after)
    return replace(case, edit=edit, image=render(before), target=render(after))


def test_a_wrong_letter_is_wrong_and_so_is_a_letter_too_many() -> None:
    for kind in ("change_text", "reverse_text"):
        case = made("ocr", kind, 1)[0]
        word = case.expected_text
        for written in (word[:-1] + ("K" if word[-1] != "K" else "Z"), word[:-1]):
            verdict = judge(case, render(retext(case.edit.after, written)))
            assert verdict.text_right is False
            assert word in verdict.reason


def test_the_right_word_does_not_excuse_a_lost_shape() -> None:
    case = next(case for case in made("ocr", "change_text", 12) if case.edit.after.objects)
    first = case.edit.after.objects[0]
    verdict = judge(case, render(replace(case.edit.after, objects=())), reading=case.expected_text)
    assert verdict.text_right
    assert not verdict.right
    assert first.kind in verdict.reason or "gone" in verdict.reason


def test_a_wrong_colour_is_wrong() -> None:
    for case in made("detail", "recolour_object", 3):
        first, *rest = case.edit.after.objects
        taken = {item.colour for item in (*case.edit.before.objects, first)}
        for colour in sorted(set(COLOURS) - taken):
            painted = replace(case.edit.after, objects=(replace(first, colour=colour), *rest))
            assert not judge(case, render(painted)).right, (case.case_id, colour)


def test_another_background_colour_or_texture_is_wrong() -> None:
    for case in made("detail", "recolour_background", 3):
        after = case.edit.after
        other = "navy" if after.backdrop != "navy" else "beige"
        assert "background" in judge(case, render(replace(after, backdrop=other))).reason
        textured = replace(after, texture="marble" if after.texture != "marble" else "bricks")
        assert "texture" in judge(case, render(textured)).reason


def test_a_changed_bystander_is_wrong() -> None:
    for case in made("detail", "remove_object", 3):
        kept, *rest = case.edit.after.objects
        gone = judge(case, render(replace(case.edit.after, objects=tuple(rest))))
        assert kept.name in gone.reason
        colour = next(name for name in COLOURS if name != kept.colour)
        repainted = replace(case.edit.after, objects=(replace(kept, colour=colour), *rest))
        assert not judge(case, render(repainted)).right


def test_a_lost_plate_is_wrong_though_the_word_is_right() -> None:
    block = TextBlock("BUS", (20, 20, 90, 50), 26, (26, 28, 34), "white")
    case = made("ocr", "change_text", 1)[0]
    before = replace(case.edit.before, texts=(block,), objects=())
    after = retext(before, "TEA")
    edit = replace(case.edit, before=before, after=after)
    case = replace(case, edit=edit, image=render(before), target=render(after), expected_text="TEA")
    bare = replace(after, texts=(replace(after.texts[0], plate=None),))
    assert judge(case, case.target).right
    assert "plate" in judge(case, render(bare), reading="TEA").reason


# --- the boundary ----------------------------------------------------------------------------------------


def test_only_written_words_are_read_and_once(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(judging, "read_text", lambda image: read.append(1) or "")
    for case in cases:
        read.clear()
        judge(case, case.target)
        assert len(read) == (case.kind in judging.WRITTEN), case.case_id
        judge(case, case.target, reading="")
        assert len(read) == (case.kind in judging.WRITTEN), case.case_id


def test_signs_that_are_no_letters_do_not_count() -> None:
    case = made("ocr", "change_text", 1)[0]
    assert judge(case, case.target, reading=f"[{case.expected_text.lower()}] +").right


def test_a_case_without_scenes_and_another_size_are_refused(cases: list[Case]) -> None:
    with pytest.raises(ValueError, match="no scenes"):
        judge(replace(cases[0], edit=None), cases[0].target)
    with pytest.raises(ValueError, match=r"\(64, 64\) px.*\(128, 128\) px"):
        judge(cases[0], cases[0].target.resize((64, 64)))
