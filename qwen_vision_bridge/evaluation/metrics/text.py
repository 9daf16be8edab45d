"""How well texts agree: what was read in an image, or replied by a language model."""

from __future__ import annotations

from math import sqrt

from ...case import exact_text as exact_text
from ...case import normalise_text
from ...synthetic.questions import BOARD

FARTHEST = 2**0.5  # sides of the image: what a reply that names no square counts as
MOST_MISCOUNTED = 8.0  # what a reply that is no number counts as


def letters_of(text: str) -> str:
    """Letters and digits alone: a plate's rim is sometimes read as a bracket, a shape as a plus."""
    return "".join(filter(str.isalnum, text))


def contains_text(read: str, expected: str) -> float:
    """1.0 where the text is part of what is read, both after `normalise_text`."""
    return float(normalise_text(expected) in normalise_text(read))


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein(a, b) / max(len(a), len(b)) after `normalise_text`, in [0, 1]; 1.0 if both are empty.

    Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals", 1966; normalised
    as in ICDAR 2019's 1-NED. Computed by rapidfuzz.
    """
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(normalise_text(a), normalise_text(b)))


def source_text_left(read: str, source: str, expected: str) -> float:
    """1.0 where the old text is still read somewhere and the new one does not hold it, else 0.0.

    The fault that TextEdit's classic track punishes (`classic_metrics_eval.py`, 2026): words are added, and
    those to be replaced stay. ValueError for an empty source text.
    """
    old, new = normalise_text(source), normalise_text(expected)
    if not old:
        raise ValueError(f"the source text {source!r} is empty; needed: the text that was to be changed")
    return float(old in normalise_text(read) and old not in new)


def letters_right(reply: str, answer: str) -> float | None:
    """Share of the answer's letters that are replied at their place in their word; words are cut by slashes.

    None where there is nothing to read.
    """
    if answer == "nothing":
        return None
    words = answer.split("/")
    replied = reply.split("/") + [""] * len(words)
    right = sum(
        a == b
        for word, read in zip(words, replied, strict=False)
        for a, b in zip(word, read.ljust(len(word)), strict=False)
    )
    return right / sum(map(len, words))


def location_error(reply: str, answer: str) -> float:
    """Distance between the centres of two squares of the board, in sides of the image; √2 for no square."""
    square = reply.strip().casefold()
    if len(square) != 2 or not set(square) <= set(BOARD):
        return FARTHEST
    across, down = (BOARD.index(a) - BOARD.index(b) for a, b in zip(square, answer, strict=True))
    return sqrt(across**2 + down**2) / len(BOARD)


def count_error(reply: str, answer: str) -> float:
    """Absolute error of a number, at most 8; 8 where the reply is no number."""
    number = int(reply) if reply.isdecimal() and len(reply) < 3 else None
    return MOST_MISCOUNTED if number is None else min(float(abs(number - int(answer))), MOST_MISCOUNTED)
