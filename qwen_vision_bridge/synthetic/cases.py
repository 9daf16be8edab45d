"""The synthetic world: images and instructions with known results.

A case is an instruction, the image it is asked of and the one that a right edit gives, so what is right
and which pixels may change are known exactly. All follows from a seed. The splits share nothing: no two draw
the same stream, and `novel` is made of words and of pairs of colour with shape or texture that no other has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from ..case import GROUPS, Case, Edit
from ..specs import check_seed
from . import instructions as edits
from . import referring
from .questions import words_of
from .sampler import Draw, NoRoomError, is_held_out
from .scene import edit_mask, render

SPLITS = ("train", "validation", "test", "novel")
EASY: dict[str, dict[str, Callable[[Draw, str], Edit]]] = {
    "ocr": {
        **dict.fromkeys(("change_text", "remove_text", "append_letter"), edits.one_word),
        "copy_text": edits.copy_text,
        "swap_words": edits.swap_words,
    },
    "space": {
        **dict.fromkeys(
            ("move_left", "move_right", "move_top", "move_bottom", "move_centre", "move_corner"), edits.move
        ),
        "move_beside": edits.move_beside,
        "swap": edits.swap,
        "align": edits.align,
    },
    "detail": {
        **dict.fromkeys(("recolour_object", "remove_object"), edits.change_object),
        "add_object": edits.add_object,
        "recolour_background": edits.recolour_background,
    },
    "consistency": {"same_object": referring.same_as},
}
REFERRING_WORDS = ("remove_word", "recolour_word", "keep_word")
HARD: dict[str, dict[str, Callable[[Draw, str], Edit]]] = {
    "ocr": {
        **dict.fromkeys(REFERRING_WORDS, referring.which_word),
        **dict.fromkeys(
            (
                "reverse_text",
                "replace_letter",
                "delete_vowels",
                "sort_letters",
                "double_letter",
                "spell_digit",
            ),
            edits.rewrite,
        ),
    },
    "space": dict.fromkeys(
        ("size", "outermost", "second", "beneath", "odd_colour", "marked", "striped", "dotted"),
        referring.which_shape,
    ),
    "detail": {"match_colour": edits.match_colour, "keep_object": edits.keep_object},
    "consistency": dict.fromkeys(("same_text", "same_colour", "same_background"), referring.same_as),
}
# Easy and hard in turn as far as they go, so that a short list has both.
KINDS: dict[str, tuple[str, ...]] = {}
for _group in GROUPS:
    _easy, _hard = list(EASY[_group]), list(HARD[_group])
    _turns = [kind for pair in zip(_easy, _hard, strict=False) for kind in pair]
    KINDS[_group] = (*_turns, *_easy[len(_turns) // 2 :], *_hard[len(_turns) // 2 :])


def make_edit(
    group: str, kind: str, rng: np.random.Generator, size: int = 128, novel: bool = False, zoom: float = 1.0
) -> Edit:
    """One instruction of a kind, with its scenes; nothing held out is in it unless `novel`.

    `zoom` enlarges the smallest type, for training: what is meant can be learnt before it can be made out.
    """
    make = (EASY[group] | HARD[group])[kind]
    while True:
        try:
            edit: Edit = make(Draw(rng, size, novel, zoom), kind)
        except NoRoomError:  # large words and shapes do not always fit together: draw others
            continue
        if novel or not any(map(is_held_out, (edit.before, edit.after, *edit.references))):
            return edit


def make_cases(
    group: str,
    count: int,
    seed: int = 0,
    size: int = 128,
    split: str = "test",
    kinds: tuple[str, ...] | None = None,
    first: int = 0,
) -> list[Case]:
    """`count` cases of one of GROUPS, its KINDS (or `kinds`) in turn, in images of `size` px a side, from
    the `first` one on.

    Case i depends on (group, split, seed, i) alone: a longer list begins with the shorter, another size
    shows the same scenes. ValueError for an unknown group, split or kind, a count below 1, a size below 64 or
    a seed that `check_seed` refuses.
    """
    for name, value, options in (("group", group, GROUPS), ("split", split, SPLITS)):
        if value not in options:
            raise ValueError(f"unknown {name} {value!r}; needed: one of {', '.join(options)}")
    check_seed(seed)
    for name, number, least in (("count", count, 1), ("size", size, 64)):
        if number < least:
            raise ValueError(f"{name} is {number}; needed: at least {least}")
    kinds = KINDS[group] if kinds is None else kinds
    if unknown := sorted(set(kinds) - set(KINDS[group])):
        raise ValueError(f"unknown kind {unknown[0]!r} of {group}; needed: {', '.join(KINDS[group])}")
    indices = range(first, first + count)
    return [_case(group, kinds[index % len(kinds)], index, seed, size, split) for index in indices]


def _case(group: str, kind: str, index: int, seed: int, size: int, split: str) -> Case:
    stream = [GROUPS.index(group), SPLITS.index(split), seed, index]
    case_seed = int(np.random.SeedSequence(stream).generate_state(1)[0])
    edit = make_edit(group, kind, np.random.default_rng(case_seed), size, split == "novel")
    before, after = edit.before, edit.after
    source, expected = (
        " ".join(filter(None, (block.text for block in words_of(scene)))) for scene in (before, after)
    )
    spoken = bool(words_of(before) or words_of(after))
    return Case(
        f"{group}-{size}px-{split}-seed{seed}-{index:04d}-{kind}",
        group,
        kind,
        edit.prompt,
        render(before),
        render(after),
        edit_mask(before, after),
        source if spoken else None,
        expected if spoken else None,
        "hard" if kind in HARD[group] else "easy",
        tuple(render(scene) for scene in edit.references),
        edit,
    )


def sample_image(size: int = 448, seed: int = 0) -> Image.Image:
    """An image with a word, three shapes and a texture: the examples' default input, (size, size) RGB.

    Raises:
        TypeError, ValueError: a size below 64, or a seed that `check_seed` refuses.
    """
    check_seed(seed)
    if size < 64:
        raise ValueError(f"size is {size}; needed: at least 64")
    draw = Draw(np.random.default_rng(seed), size)
    while True:
        with suppress(NoRoomError):  # a large word leaves no room for three shapes: draw on, as `make_edit`
            return render(edits.sample_scene(draw))
