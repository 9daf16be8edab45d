"""Metrics of public benchmarks by their own definitions, beside those that every case gets.

They follow the definitions of the repositories that are named, not their code, and their figures are no entry
of a leaderboard: TextEdit reads with PaddleOCR's English models, this with `ocr`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...case import Box
from .ocr import ImageOrArray, pixels_of
from .pixels import SSIM_OPTIONS, box_overlap
from .text import edit_similarity

SAME_LINE = 10.0  # px between the middles of neighbours on a line
IN_REGION = 0.5  # IoU with the edited region
AT_SOURCE = 0.3  # IoU with the box of the old text
NOT_THE_SOURCE = 0.6  # similarity that the old text's box must exceed
STAYED = 0.2  # what is left of a score where the old text stayed
OWN_WEIGHT = 0.5  # of the edited text among everything that is read


class Word(NamedTuple):
    """A text that was read, and where."""

    text: str
    box: Box


class RegionScores(NamedTuple):
    """TextEdit's classic track for one edit, each in [0, 1]."""

    target_accuracy: float
    """Best similarity to the wanted text of what is read where the old text was."""
    precision: float
    recall: float
    f1: float
    """Of the wanted text, which weighs half, and every other line, which had to stay."""
    roi_ned: float
    """Similarity to the wanted text of all that is read in the old text's box."""


def region_scores(before: Sequence[Word], after: Sequence[Word], source: str, target: str) -> RegionScores:
    """TextEdit's region-aware scores (open-compass/TextEdit, `eval_pipeline/classic_metrics_eval.py`, 2026).

    The line of `before` that holds the source text, or is most like it, is where the edit belongs; where none
    is at least half alike, or nothing is read in the edit, all scores are 0, as there.

    Args:
        before, after: what is read in the image and in its edit, of one size.
    """
    lines, source, target = _lines(before), _plain(source), _plain(target)
    alike = [1.0 if source in _text(line) else edit_similarity(source, _text(line)) for line in lines]
    if not lines or max(alike) < 0.5 or not after:
        return RegionScores(0.0, 0.0, 0.0, 0.0, 0.0)
    edited = lines[int(np.argmax(alike))]
    left, top, right, bottom = zip(*(word.box for word in edited), strict=True)
    region = min(left), min(top), max(right), max(bottom)
    within = [w for w in after if box_overlap(w.box, region) > IN_REGION or _holds(region, w)]
    readings = map(_text, [*([word] for word in within), *_lines(within)])  # each word alone, and each line
    accuracy = max((edit_similarity(target, read) for read in readings), default=0.0)
    everything = _text(after)
    if source in everything and target not in everything:
        accuracy *= STAYED
    stay = _lines([word for line in lines if line is not edited for word in line])
    others = _lines([word for word in after if word not in within])
    kept = _kept(stay, others)
    unit = (1 - OWN_WEIGHT) / len(stay) if stay else 0.0
    score = accuracy * OWN_WEIGHT + kept * unit
    recall = score / (OWN_WEIGHT + len(stay) * unit)
    precision = score / (OWN_WEIGHT + len(others) * unit)
    f1 = 2 * precision * recall / (precision + recall) if score else 0.0
    return RegionScores(accuracy, precision, recall, f1, _roi_ned(before, after, source, target))


def masked_scores(image: ImageOrArray, original: ImageOrArray, mask: np.ndarray) -> dict[str, float] | None:
    """PIE-Bench's background metrics (cure-lab/PnPInversion, `evaluation/matrics_calculator.py`, 2023).

    Both images are made black where the mask, bool (H, W), is True, and then compared whole, so the black
    counts as agreement and the figures are higher than those over the background alone.

    Returns:
        `pie_psnr_db` (100 where they are equal), `pie_mse` (of values in [0, 1]) and `pie_ssim`; None where
        the mask is True everywhere, as there.
    """
    from skimage.metrics import structural_similarity

    first, second = pixels_of(image), pixels_of(original)
    if first.shape != second.shape or mask.shape != first.shape[:2]:
        shapes = f"{first.shape}, {second.shape} and {mask.shape}"
        raise ValueError(f"images and mask are {shapes}; needed: one size")
    if mask.all():
        return None
    first, second = (np.where(mask[..., None], 0, pixels) / 255 for pixels in (first, second))
    error = float(np.mean((first - second) ** 2))
    # Over the whole image with mirrored rims, as torchmetrics has it; scikit-image leaves the rims out.
    wide = [np.pad(pixels, ((5, 5), (5, 5), (0, 0)), mode="reflect") for pixels in (first, second)]
    _, similarity = structural_similarity(*wide, channel_axis=-1, data_range=1.0, **SSIM_OPTIONS)
    psnr = 100.0 if error == 0 else min(float(-10 * np.log10(error)), 100.0)
    return {"pie_psnr_db": psnr, "pie_mse": error, "pie_ssim": float(similarity[5:-5, 5:-5].mean())}


def _roi_ned(before: Sequence[Word], after: Sequence[Word], source: str, target: str) -> float:
    best = max(before, key=lambda word: edit_similarity(source, _plain(word.text)))
    if edit_similarity(source, _plain(best.text)) <= NOT_THE_SOURCE:
        return 0.0
    there = [word for word in after if box_overlap(word.box, best.box) > AT_SOURCE]
    if not there:
        return 0.0
    read = _text(sorted(there, key=_left))
    score = edit_similarity(target, read)
    stayed = edit_similarity(source, read) > 0.9 and edit_similarity(source, target) < 0.5
    return score * STAYED if stayed else score


def _kept(stay: Sequence[list[Word]], others: Sequence[list[Word]]) -> float:
    """Sum over the lines that had to stay of the similarity to the line most like it, each taken once."""
    left, total = list(others), 0.0
    for line in stay:
        scores = [edit_similarity(_text(line), _text(other)) for other in left]
        if (best := max(scores, default=0.0)) > 0:
            left.pop(scores.index(best))
            total += best
    return total


def _lines(words: Sequence[Word]) -> list[list[Word]]:
    """Words whose middles are within `SAME_LINE` of the one before, from the top, each line from the left."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=_middle):
        if lines and _middle(word) - _middle(lines[-1][-1]) < SAME_LINE:
            lines[-1].append(word)
        else:
            lines.append([word])
    return [sorted(line, key=_left) for line in lines]


def _left(word: Word) -> float:
    return word.box[0]


def _middle(word: Word) -> float:
    return (word.box[1] + word.box[3]) / 2


def _text(line: Sequence[Word]) -> str:
    return _plain("".join(word.text for word in line))


def _plain(text: str) -> str:
    """Lower case, letters and digits alone, Unicode form NFKC."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).lower()))


def _holds(region: Box, word: Word) -> bool:
    """Whether the middle of a word is in the region."""
    across = (word.box[0] + word.box[2]) / 2
    return region[0] <= across <= region[2] and region[1] <= _middle(word) <= region[3]
