"""Questions about synthetic scenes and cases, with their right answers."""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

import numpy as np

from ..case import Case, Scene, TextBlock
from .instructions import square
from .sampler import Draw

BOARD = "abcdefgh"
"""Columns and rows of the board of 8 × 8 squares on which places are named, see `instructions.square`."""
REPLY_FORMS = {
    "read": "Reply with the text alone, lines from top to bottom with a slash between them.",
    "locate": (
        "Think of a board of 8 by 8 squares over the image. Reply with two letters alone: the column, a "
        "(left) to h (right), then the row, a (top) to h (bottom)."
    ),
    "count": "Reply with a number alone.",
}
"""The form of the reply, for models that were not trained on these questions."""
READ, COUNT, DESCRIBE = "What does it say?", "How many shapes are there?", "Describe the picture."


class Question(NamedTuple):
    """Something to ask about the last image of a case."""

    kind: Literal["read", "locate", "count"]
    text: str
    answer: str


def questions_of(case: Case) -> list[Question]:
    """What to ask about a case's image: nothing where neither its scene nor its words are known."""
    if case.edit is None:
        return [Question("read", READ, case.reply_text)] if case.reply_text else []
    scene = case.edit.before
    questions = [Question("count", *count_question(scene))]
    text, answer = locate_question(scene, np.random.default_rng(zlib.crc32(case.case_id.encode())))
    if text != COUNT:
        questions.insert(0, Question("locate", text, answer))
    if case.source_text is not None:
        questions.insert(0, Question("read", *read_question(scene)))
    return questions


def words_of(scene: Scene) -> list[TextBlock]:
    """The texts of a scene that are words or numbers, not letters on shapes, from top to bottom."""
    words = (block for block in scene.texts if len(block.text) != 1 or block.text.isdigit())
    return sorted(words, key=lambda block: block.centre[1])


def read_question(scene: Scene) -> tuple[str, str]:
    """What to ask about the words of a scene, and the right answer."""
    return READ, "/".join(block.text for block in words_of(scene) if block.text) or "nothing"


def count_question(scene: Scene) -> tuple[str, str]:
    """How many shapes are there?"""
    return COUNT, str(len(scene.objects))


def locate_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Where is one of the words or shapes? The answer is a square; an empty scene is counted instead."""
    draw = Draw(rng, scene.size)
    words = [(f'the word "{block.text}"', block.centre) for block in words_of(scene) if block.text]
    labels = [(f'the letter "{block.text}"', block.centre) for block in scene.texts if len(block.text) == 1]
    things = [(f"the {item.name}", item.centre) for item in scene.objects]
    things += [(f"the shape with {item.mark}", item.centre) for item in scene.objects if item.mark]
    options = words + labels + things
    if not options:
        return COUNT, "0"
    what, where = options[int(rng.integers(len(options)))]
    return f"Where is {what}?", square(draw, where)


def describe_question(scene: Scene) -> tuple[str, str]:
    """Everything in the scene: background, then texts and shapes with their squares, from the top left."""
    draw = Draw(np.random.default_rng(0), scene.size)
    items = [(square(draw, block.centre), f'"{block.text}"') for block in scene.texts if block.text]
    items += [(square(draw, item.centre), f" {item.name}") for item in scene.objects]
    ordered = sorted(items, key=lambda item: (item[0][1], item[0]))
    return DESCRIBE, f"{scene.texture} {scene.backdrop};" + ";".join(map("".join, ordered))


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its right answer: to read, to locate or to describe."""
    turn = rng.random()
    if turn < 0.25:
        return read_question(scene)
    if turn < 0.5:
        return locate_question(scene, rng)
    if turn < 0.55:
        return count_question(scene)
    return describe_question(scene)
