"""Every metric of an evaluation: what it needs of a case, its function, its direction and its source.

An edit gets the metrics whose needs its case meets, see `facts_of`; a reply to a question those of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...case import OTHER, Case
from . import objects, ocr, pixels, text
from .benchmarks import RegionScores, Word, masked_scores, region_scores
from .consistency import agreement
from .correctness import WRITTEN, judge
from .lpips import WEIGHTS, lpips, lpips_missing
from .registration import Drift, measure_drift

READ_UNKNOWN = ("ocr", OTHER)  # groups whose images are read before and after where no right text is known
BRIGHTEST = 255.0  # grey levels between black and white
BEST_PSNR = 100.0  # dB: equal regions would be infinite, which has no mean
Boxes = list[tuple[str, np.ndarray]]


class EditedImage:
    """One edited image beside its case; what several metrics need is worked out once, when it is needed.

    Raises:
        ValueError: an image of another size than the case's.
    """

    def __init__(self, case: Case, image: Image.Image) -> None:
        if image.size != case.image.size:
            raise ValueError(f"the edit is {image.size} px, the case {case.case_id} is {case.image.size} px")
        self.case, self.image, self.original = case, image, case.image
        self.objects, self.boxes = case.expected_objects, case.boxes
        # Not every case has these; a metric that asks for one has it among its needs.
        self.target: Any = case.target
        self.mask: Any = case.edit_mask
        self.source_text: Any = case.source_text
        self.expected_text: Any = case.expected_text

    @cached_property
    def read(self) -> Boxes:
        """Every text that is read, and where; reading is the slowest part."""
        return ocr.read_boxes(self.image)

    @property
    def text(self) -> str:
        """All that is read, in order."""
        return ocr.in_order(self.read)

    @property
    def text_before(self) -> str:
        """All that is read in the unedited image."""
        return ocr.in_order(_read(self.original.tobytes(), self.original.size))

    @cached_property
    def unedited(self) -> np.ndarray:
        """Where nothing may change, without its rim, bool (H, W)."""
        return pixels.shrink(~self.mask)

    @cached_property
    def drift(self) -> Drift | None:
        return measure_drift(self.image, self.original)

    @cached_property
    def agreement(self) -> dict[str, float]:
        """What the edit shares with its reference."""
        return agreement(self.case, self.image, self.text if self.case.kind == "same_text" else None)

    @cached_property
    def region_scores(self) -> RegionScores:
        """TextEdit's scores of the edited line."""
        before = _as_words(_read(self.original.tobytes(), self.original.size))
        return region_scores(before, _as_words(self.read), self.source_text, self.expected_text)

    @cached_property
    def masked_scores(self) -> dict[str, float]:
        """PIE-Bench's scores of the background."""
        return masked_scores(self.image, self.original, self.mask) or {}


class Reply(NamedTuple):
    """A language model's reply beside the right answer."""

    reply: str
    answer: str


@dataclass(frozen=True)
class Metric:
    """One number of an edit or a reply."""

    name: str
    needs: tuple[str, ...]
    """What a case or question must have for it, see `facts_of`."""
    function: Callable[..., float | None] | None
    """None as a value is no value; a metric without a function is measured over several images at once."""
    higher_is_better: bool | None
    """None where neither is: such a metric is neither won nor lost, whatever its interval."""
    source: str = ""
    """Paper, benchmark or package of its definition; "" for this project's own."""
    is_share: bool = False
    """Whether it lies in 0 to 1, so that points make sense."""
    most: float | None = None
    """The largest value, where there is one and the metric is no share."""

    @property
    def span(self) -> float | None:
        """The largest difference of two values; None where there is none."""
        return 1.0 if self.is_share else self.most


def is_readable(case: Case) -> bool:
    """Whether the reader knows all letters that the case's words are drawn from."""
    return not case.alphabet or ocr.can_read(case.alphabet)


def facts_of(case: Case) -> frozenset[str]:
    """What is known of a case, in the words that `Metric.needs` uses."""
    mask, known_scene = case.edit_mask, case.edit is not None
    has_text = case.expected_text is not None and is_readable(case)
    # A synthetic case without a text to write is not read: its words are part of the unedited region.
    has_text &= not known_scene or case.group == "ocr" or case.kind == "same_text"
    facts = {
        "image": True,
        "verdict": known_scene or (has_text and not case.dataset),
        "text": has_text,
        "whole text": has_text and not case.text_is_part,
        "source text": has_text and bool(case.source_text),
        "text region": has_text and bool(case.source_text and case.dataset),
        "unknown text": case.has_unknown_text and case.group in READ_UNKNOWN,
        "unknown result": case.has_unknown_text and case.target is None,
        "layout": known_scene and case.group == "space",
        "objects": bool(case.expected_objects) and case.group != "ocr",
        "boxes": bool(case.boxes),
        "reference": known_scene and case.group == "consistency",
        "target": case.target is not None,
        "edited region": case.target is not None and mask is not None and bool(mask.any()),
        "unedited region": mask is not None and not mask.all(),
        "pie": case.dataset == "pie",
    }
    return frozenset(name for name, known in facts.items() if known)


def _right(edit: EditedImage) -> float:
    case = edit.case
    if case.edit is None:  # a word is all that is asked for
        return text.exact_text(text.letters_of(edit.text), text.letters_of(edit.expected_text))
    return float(judge(case, edit.image, edit.text if case.kind in WRITTEN else None).right)


def _exact_text(edit: EditedImage) -> float:
    compare = text.contains_text if edit.case.text_is_part else text.exact_text
    return compare(edit.text, edit.expected_text)


def _text_kept(edit: EditedImage) -> float | None:
    return text.edit_similarity(edit.text, edit.text_before) if edit.text_before else None


def _psnr(edit: EditedImage) -> float:
    return min(pixels.masked_psnr(edit.image, edit.original, edit.unedited), BEST_PSNR)


def _lpips(net: str) -> Callable[[EditedImage], float | None]:
    return lambda edit: None if lpips_missing(net) else lpips(edit.image, edit.original, net, ~edit.mask)


def _drift(read: Callable[[Drift], float]) -> Callable[[EditedImage], float | None]:
    return lambda edit: None if edit.drift is None else read(edit.drift)


def _of(function: Callable[..., float | None], *names: str) -> Callable[[object], float | None]:
    """The function of these attributes of an edit or a reply."""
    return lambda subject: function(*(getattr(subject, name) for name in names))


HIGHER, LOWER, NEITHER = True, False, None
SHARE = True
LAYOUT, EDITED, UNEDITED = ("layout", "objects"), ("edited region",), ("unedited region",)
# What functions are computed from.
THINGS, OVERLAP, WRITING = ("image", "objects"), ("image", "target", "objects"), ("text", "expected_text")
INSIDE, OUTSIDE, REPLY = ("image", "target", "mask"), ("image", "original", "unedited"), ("reply", "answer")
_TEXTEDIT, _PIE, _1NED = "TextEdit, classic track", "PIE-Bench", "ICDAR 2019, 1-NED"
_CIEDE2000, _SSIM, _DRIFT = "Sharma, Wu and Dalal 2005", "Wang et al. 2004", "Lucas and Kanade 1981"
_JACCARD, _VISOR, _PAIR = "Jaccard 1912", "after VISOR, Gokhale et al. 2022", ("another edit",)
_SOURCE_LEFT = _of(text.source_text_left, "text", "source_text", "expected_text")
_CHANGE = _of(pixels.mean_abs_difference, "image", "original")
_DIFFERENCE = _of(pixels.mean_abs_difference, "image", "target")


def _region(field: str) -> Metric:
    read = attrgetter(f"region_scores.{field}")
    return Metric(f"region_{field}", ("text region",), read, HIGHER, _TEXTEDIT, SHARE)


def _pie(field: str, higher: bool, share: bool = False, most: float | None = None) -> Metric:
    return Metric(field, ("pie",), lambda edit: edit.masked_scores.get(field), higher, _PIE, share, most)


def _agrees(field: str, higher: bool, source: str = "", share: bool = False) -> Metric:
    return Metric(field, ("reference",), lambda edit: edit.agreement.get(field), higher, source, share)


_ENTRIES = (
    Metric("right", ("verdict",), _right, HIGHER, "", SHARE),
    Metric("exact_text", ("text",), _exact_text, HIGHER, "ICDAR 2015, task 4.3", SHARE),
    Metric("edit_similarity", ("whole text",), _of(text.edit_similarity, *WRITING), HIGHER, _1NED, SHARE),
    Metric("source_text_left", ("source text",), _SOURCE_LEFT, LOWER, _TEXTEDIT, SHARE),
    *(_region(field) for field in RegionScores._fields),
    Metric("centroid_error_px", LAYOUT, _of(objects.centroid_error, *THINGS), LOWER, "Kuhn 1955"),
    Metric("object_iou", LAYOUT, _of(objects.object_iou, *OVERLAP), HIGHER, _JACCARD, SHARE),
    Metric("iou_by_object", ("objects",), _of(objects.iou_by_object, *OVERLAP), HIGHER, _JACCARD, SHARE),
    Metric("objects_lost", LAYOUT, _of(objects.objects_lost, *THINGS), LOWER),
    Metric("objects_invented", ("layout",), _of(objects.objects_invented, *THINGS), LOWER),
    Metric("relations_kept", LAYOUT, _of(objects.relations_kept, *THINGS), HIGHER, _VISOR, SHARE),
    Metric("box_iou", ("boxes",), _of(objects.box_iou, "image", "boxes"), HIGHER, "", SHARE),
    Metric("edited_colour_error", EDITED, _of(pixels.colour_difference, *INSIDE), LOWER, _CIEDE2000),
    Metric("edited_ssim", EDITED, _of(pixels.masked_ssim, *INSIDE), HIGHER, _SSIM, SHARE),
    Metric("unedited_ssim", UNEDITED, _of(pixels.masked_ssim, *OUTSIDE), HIGHER, _SSIM, SHARE),
    Metric("unedited_psnr_db", UNEDITED, _psnr, HIGHER, most=BEST_PSNR),
    Metric("unedited_texture", UNEDITED, _of(pixels.texture_kept, *OUTSIDE), HIGHER, "Lewis 1995", SHARE),
    *(Metric(f"unedited_lpips_{net}", UNEDITED, _lpips(net), LOWER, "Zhang et al. 2018") for net in WEIGHTS),
    _pie("pie_psnr_db", HIGHER, most=BEST_PSNR),
    _pie("pie_mse", LOWER, most=1.0),
    _pie("pie_ssim", HIGHER, SHARE),
    Metric("target_difference", ("target",), _DIFFERENCE, LOWER, most=BRIGHTEST),
    _agrees("agrees_text", HIGHER, _1NED, SHARE),
    _agrees("agrees_colour_off", LOWER, _CIEDE2000),
    _agrees("agrees_place_off", LOWER),
    Metric("pair_colour_off", _PAIR, None, LOWER, _CIEDE2000),
    Metric("pair_place_off", _PAIR, None, LOWER),
    Metric("pair_size_ratio", _PAIR, None, HIGHER, "", SHARE),
    Metric("change_from_input", ("unknown result",), _CHANGE, NEITHER, most=BRIGHTEST),
    Metric("text_kept", ("unknown text",), _text_kept, NEITHER, _1NED, SHARE),
    Metric("drift_shift_px", ("image",), _drift(lambda drift: drift.shift_px), LOWER, _DRIFT),
    Metric("drift_scale_percent", ("image",), _drift(lambda drift: drift.scale_percent), LOWER, _DRIFT),
    Metric("drift_rotation_deg", ("image",), _drift(lambda drift: abs(drift.rotation_deg)), LOWER, _DRIFT),
    Metric("answered", ("question",), _of(text.exact_text, *REPLY), HIGHER, "", SHARE),
    Metric("letters", ("read",), _of(text.letters_right, *REPLY), HIGHER, "", SHARE),
    Metric("reply_similarity", ("read",), _of(text.edit_similarity, *REPLY), HIGHER, _1NED, SHARE),
    Metric("location_error", ("locate",), _of(text.location_error, *REPLY), LOWER, most=text.FARTHEST),
    Metric("count_error", ("count",), _of(text.count_error, *REPLY), LOWER, most=text.MOST_MISCOUNTED),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ENTRIES}
"""By name, in the order of tables."""
HEADLINES = {"edit": "right", "perception": "answered"}
"""The metric that decides, by level."""
STATED = ("exact_text", "edited_ssim", "target_difference", "box_iou", "unedited_ssim")
"""What decides an edit instead where no case of a group knows all: what its file says of a right edit."""


def verdict_of(metrics: Mapping[str, float]) -> float | None:
    """1.0 for a right edit, 0.0 for a wrong one, None where its metrics cannot tell.

    A case from a file that states a text and nothing else is right where that text is read.
    """
    if "right" in metrics:
        return metrics["right"]
    others = metrics.keys() & set(STATED[1:])
    return None if others else metrics.get("exact_text")


def measured(subject: EditedImage | Reply, facts: frozenset[str]) -> dict[str, float]:
    """Every metric of an edit or a reply whose needs are met, by name."""
    values = {
        metric.name: metric.function(subject)
        for metric in METRICS.values()
        if metric.function is not None and facts.issuperset(metric.needs)
    }
    return {name: value for name, value in values.items() if value is not None}


def _as_words(boxes: Boxes) -> list[Word]:
    """Texts with their upright boxes."""
    return [Word(read, (*corners.min(0).tolist(), *corners.max(0).tolist())) for read, corners in boxes]


@lru_cache(maxsize=8)
def _read(data: bytes, size: tuple[int, int]) -> Boxes:
    """What is read in an unedited image, the same for all its arms."""
    return ocr.read_boxes(Image.frombytes("RGB", size, data))
