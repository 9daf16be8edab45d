"""The synthetic world: images and instructions with known answers, and questions about the images.

A case is an instruction, the image it is asked of and the one that a right edit gives, so what is right
and which pixels may change are known exactly. All follows from a seed. The splits share nothing: no two draw
the same stream, and `novel` is made of words and of pairs of colour with shape or texture that no other has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..specs import check_seed
from . import instructions as edits
from . import multi_image as consistency
from . import referring
from .instructions import Edit, square
from .sampler import Draw, NoRoomError, is_held_out
from .scene import Scene, SceneObject, TextBlock, edit_mask, render

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
    "consistency": {"same_object": consistency.same_as},
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
    "consistency": dict.fromkeys(("same_text", "same_colour", "same_background"), consistency.same_as),
}
GROUPS = tuple(EASY)
# Easy and hard in turn as far as they go, so that a short list has both.
KINDS: dict[str, tuple[str, ...]] = {}
for _group in GROUPS:
    _easy, _hard = list(EASY[_group]), list(HARD[_group])
    _turns = [kind for pair in zip(_easy, _hard, strict=False) for kind in pair]
    KINDS[_group] = (*_turns, *_easy[len(_turns) // 2 :], *_hard[len(_turns) // 2 :])


@dataclass(frozen=True, eq=False)
class Case:
    """One instruction, its images and what a right edit looks like. `edit_mask` is bool (H, W), True where
    the edit may change pixels; elsewhere `image` and `target` agree. `source_text` and `expected_text` are
    the words before and after, from top to bottom with spaces between ("" when they must be gone, None when
    there never was one). `expected_objects` are the shapes of the target, those the edit concerns first."""

    case_id: str
    group: str
    kind: str
    prompt: str
    image: Image.Image
    target: Image.Image
    edit_mask: np.ndarray
    source_text: str | None
    expected_text: str | None
    expected_objects: tuple[SceneObject, ...]
    seed: int
    difficulty: str = "easy"
    """`easy` or `hard`: whether the instruction says all, or needs seeing."""
    outright: str | None = None
    """Of a hard case: the same request with nothing left to see."""
    references: tuple[Image.Image, ...] = ()
    """Images that come before `image` in the prompt."""
    answer: str = ""
    """Where and what is meant, as the miniature's language models learn to reply."""
    edit: Edit | None = None
    """The scenes behind the images."""

    @property
    def images(self) -> list[Image.Image]:
        """All images of the prompt; the last one is edited."""
        return [*self.references, self.image]


def make_edit(
    group: str, kind: str, rng: np.random.Generator, size: int = 128, novel: bool = False, zoom: float = 1.0
) -> Edit:
    """One instruction of a kind, with its scenes; nothing held out is in it unless `novel`.

    `zoom` enlarges the smallest type, for training: what is meant can be learnt before it can be made out.
    """
    executor = (EASY[group] | HARD[group])[kind]
    while True:
        try:
            edit: Edit = executor(Draw(rng, size, novel, zoom), kind)
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
    for name, given, options in (("group", group, GROUPS), ("split", split, SPLITS)):
        if given not in options:
            raise ValueError(f"unknown {name} {given!r}; needed: one of {', '.join(options)}")
    check_seed(seed)
    for name, given, least in (("count", count, 1), ("size", size, 64)):
        if given < least:
            raise ValueError(f"{name} is {given}; needed: at least {least}")
    kinds = KINDS[group] if kinds is None else kinds
    if strange := sorted(set(kinds) - set(KINDS[group])):
        raise ValueError(f"unknown kind {strange[0]!r} of {group}; needed: {', '.join(KINDS[group])}")
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
        after.objects,
        case_seed,
        "hard" if kind in HARD[group] else "easy",
        edit.outright,
        tuple(render(scene) for scene in edit.references),
        edit.answer,
        edit,
    )


def words_of(scene: Scene) -> list[TextBlock]:
    """The texts of a scene that are words or numbers, not letters on shapes, from top to bottom."""
    words = (block for block in scene.texts if len(block.text) != 1 or block.text.isdigit())
    return sorted(words, key=lambda block: block.centre[1])


def read_question(scene: Scene) -> tuple[str, str]:
    """What to ask about the words of a scene, and the right answer."""
    return "What does it say?", "/".join(block.text for block in words_of(scene) if block.text) or "nothing"


def locate_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Where is one of the words or shapes? The answer is a square, see `edits.square`."""
    draw = Draw(rng, scene.size)
    words = [(f'the word "{block.text}"', block.centre) for block in words_of(scene) if block.text]
    labels = [(f'the letter "{block.text}"', block.centre) for block in scene.texts if len(block.text) == 1]
    things = [(f"the {item.name}", item.centre) for item in scene.objects]
    things += [(f"the shape with {item.mark}", item.centre) for item in scene.objects if item.mark]
    options = words + labels + things
    if not options:
        return "How many shapes are there?", "0"
    what, where = options[int(rng.integers(len(options)))]
    return f"Where is {what}?", square(draw, where)


def describe_question(scene: Scene) -> tuple[str, str]:
    """Everything in the scene: background, then texts and shapes with their squares, from the top left."""
    draw = Draw(np.random.default_rng(0), scene.size)
    found = [(square(draw, block.centre), f'"{block.text}"') for block in scene.texts if block.text]
    found += [(square(draw, item.centre), f" {item.name}") for item in scene.objects]
    listed = ";".join(f"{where}{what}" for where, what in sorted(found, key=lambda f: (f[0][1], f[0])))
    return "Describe the picture.", f"{scene.texture} {scene.backdrop};{listed}"


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its right answer: to read, to locate or to describe."""
    turn = rng.random()
    if turn < 0.25:
        return read_question(scene)
    if turn < 0.5:
        return locate_question(scene, rng)
    if turn < 0.55:
        return "How many shapes are there?", str(len(scene.objects))
    return describe_question(scene)


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
