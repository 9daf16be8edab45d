"""Which metrics an image gets: those that its case has the truth for, and no others."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ..synthetic.cases import Case
from ..synthetic.multilingual import LanguageCase
from ..synthetic.scene import COLOURS
from .benchmark_metrics import Word, masked_scores, region_scores
from .correctness import judge
from .folder_dataset import OTHER, FileCase
from .metrics import ocr as reading
from .metrics import pixels as metrics
from .metrics.consistency import agreement
from .metrics.lpips import WEIGHTS, lpips, lpips_missing
from .metrics.registration import measure_drift
from .statistics import Metric

METRICS = {
    "right": Metric(True, True),
    "exact_text": Metric(True, True),
    "edit_similarity": Metric(True, True),
    "source_text_left": Metric(False, True),
    "region_target_accuracy": Metric(True, True),
    "region_precision": Metric(True, True),
    "region_recall": Metric(True, True),
    "region_f1": Metric(True, True),
    "region_roi_ned": Metric(True, True),
    "centroid_error_px": Metric(False),
    "object_iou": Metric(True, True),
    "iou_by_object": Metric(True, True),
    "objects_lost": Metric(False),
    "objects_invented": Metric(False),
    "relations_kept": Metric(True, True),
    "box_iou": Metric(True, True),
    "edited_colour_error": Metric(False),
    "edited_ssim": Metric(True, True),
    "unedited_ssim": Metric(True, True),
    "unedited_psnr_db": Metric(True),
    "unedited_texture": Metric(True, True),
    **{f"unedited_lpips_{net}": Metric(False) for net in WEIGHTS},
    "pie_psnr_db": Metric(True),
    "pie_mse": Metric(False),
    "pie_ssim": Metric(True, True),
    "target_difference": Metric(False),
    "agrees_text": Metric(True, True),
    "agrees_colour_off": Metric(False),
    "agrees_place_off": Metric(False),
    "pair_colour_off": Metric(False),
    "pair_place_off": Metric(False),
    "pair_size_ratio": Metric(True, True),
    "change_from_input": Metric(None),
    "text_kept": Metric(None, True),
    "drift_shift_px": Metric(False),
    "drift_scale_percent": Metric(False),
    "drift_rotation_deg": Metric(False),
    "answered": Metric(True, True),
    "reply_similarity": Metric(True, True),
    "location_error": Metric(False),
    "count_error": Metric(False),
}
BENCHMARK_GAPS = {
    "textedit": "TextEdit: its CLIP and aesthetic scores and its judging by a model are not measured; "
    "texts are read by another reader than its own, so the figures are no entry of its leaderboard",
    "pie": "PIE-Bench: its structure distance (DINO) and CLIP similarity need weights that no package ships",
    "gedit": "GEdit-Bench: its judging by GPT-4o is not done; images get the metrics that need no truth",
}
HEADLINES = {"edit": "right", "perception": "answered"}
READ_BLIND = ("ocr", OTHER)  # groups of images without a truth whose text is read before and after
DIGITS = 6  # decimals of a recorded metric
BEST_PSNR = 100.0  # dB: equal regions would be infinite, which has no mean


def unmeasured(cases: Sequence[Any]) -> list[str]:
    """Metrics that these cases would get and this machine cannot give, with the reason."""
    lines = []
    if any(case.edit_mask is not None for case in cases):
        lines += [f"LPIPS ({net}): {why}" for net in WEIGHTS if (why := lpips_missing(net))]
    known = {getattr(case, "benchmark", "") for case in cases}
    return lines + [words for name, words in BENCHMARK_GAPS.items() if name in known]


class Scorer:
    """`measure` for many images: in this process, or in some of their own while this one makes the next.

    Args:
        workers: how many processes; 0 measures here.

    Raises:
        ValueError: fewer than 0.
    """

    def __init__(self, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"workers is {workers}; needed: at least 0")
        self.queue = 4 * workers  # images that may wait
        self._pool = None
        if workers:
            # Forked processes would share the threads and the CUDA context of this one.
            fresh = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, fresh, initializer=_prepare_worker)

    def submit(self, case: Any, image: Image.Image) -> Future[dict[str, Any]]:
        """What a record says of an image, sooner or later: `metrics`, and what was read without a truth."""
        if self._pool is not None:
            return self._pool.submit(_found, case, image)
        done: Future[dict[str, Any]] = Future()
        try:
            done.set_result(_found(case, image))
        except Exception as error:  # raised where the result is asked for, as a pool's is
            done.set_exception(error)
        return done

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what still waits is not measured."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _found(case: Any, image: Image.Image) -> dict[str, Any]:
    return {"metrics": measure(case, image), **texts_of(case, image)}


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    reading.OCR_THREADS = 1  # of many processes each has one core
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # the reader's own, not imported yet


def measure(case: Any, image: Image.Image) -> dict[str, float]:
    """Every metric that a case has the truth for, of one edited image.

    Args:
        case: a `world.Case`, or one from files. What it lacks (target, mask, text, boxes) is not measured.
        image: RGB, of the size of the case's image.

    Raises:
        ValueError: an image of another size.
    """
    if image.size != case.image.size:
        raise ValueError(f"the edit is {image.size} px, the case {case.case_id} is {case.image.size} px")
    # Reading is the slowest part: once an image, and only where a text is expected.
    blind = isinstance(case, FileCase) and case.expected_text is None  # nothing is known of its text
    reads = case.expected_text is not None and getattr(case, "readable", True)
    reads = reads and (case.group == "ocr" or case.kind == "same_text" or not isinstance(case, Case))
    boxes = reading.read_boxes(image) if reads or (blind and case.group in READ_BLIND) else None
    read = None if boxes is None else reading.in_order(boxes)
    values: dict[str, float | None] = {}
    if isinstance(case, Case) and case.edit is not None:
        values["right"] = float(judge(case, image, read).right)
    elif isinstance(case, LanguageCase) and read is not None:
        letters = ["".join(filter(str.isalnum, text)) for text in (read, case.expected_text)]
        values["right"] = metrics.exact_text(*letters)
    if read is not None and not blind:
        values |= _text(case, read)
    if blind and case.target is None:
        values["change_from_input"] = metrics.mean_abs_difference(image, case.image)
    if blind and read is not None:
        values["text_kept"] = metrics.edit_similarity(read, _text_before(case))
    if isinstance(case, FileCase):
        values |= _published(case, image, boxes)
    if case.group == "space" and isinstance(case, Case):
        values |= _space(case, image)
    if case.group in ("detail", "consistency") and isinstance(case, Case) and case.expected_objects:
        values["iou_by_object"] = metrics.iou_by_object(image, case.target, case.expected_objects)
    if case.group == "consistency" and isinstance(case, Case):
        values |= agreement(case, image, read)
    if expected := getattr(case, "boxes", ()):
        values["box_iou"] = _box_iou(image, expected)
    values |= _detail(case, image) | _drift(case, image)
    # The number of threads moves the last digits of long sums; a result must not depend on it.
    kept = {name: values[name] for name in METRICS if values.get(name) is not None}
    return {name: round(value, DIGITS) for name, value in kept.items()}


def _text(case: Any, read: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "exact_text": metrics.exact_text(read, case.expected_text),
        "edit_similarity": metrics.edit_similarity(read, case.expected_text),
    }
    if getattr(case, "text_is_part", False):  # the image says more than the text that was to change
        found = metrics.normalise_text(case.expected_text) in metrics.normalise_text(read)
        values = {"exact_text": float(found)}
    if case.source_text:
        values["source_text_left"] = metrics.source_text_left(read, case.source_text, case.expected_text)
    return values


def _published(
    case: FileCase, image: Image.Image, boxes: list[tuple[str, np.ndarray]] | None
) -> dict[str, float | None]:
    """What the authors of public benchmarks measure, where a case has what it takes."""
    values: dict[str, float | None] = {}
    if boxes is not None and case.source_text and case.expected_text is not None:
        before = _words(case.image.tobytes(), case.image.size)
        scores = region_scores(before, _as_words(boxes), case.source_text, case.expected_text)
        values |= {f"region_{name}": value for name, value in scores._asdict().items()}
    if case.benchmark == "pie":
        values |= masked_scores(image, case.image, case.edit_mask) or {}
    return values


def texts_of(case: Any, image: Image.Image) -> dict[str, str]:
    """What is read before and after, where that is measured without a truth; both are read already."""
    if not isinstance(case, FileCase) or case.expected_text is not None or case.group not in READ_BLIND:
        return {}
    return {"read_before": _text_before(case), "read_after": _read(image.tobytes(), image.size)}


def _text_before(case: FileCase) -> str:
    return _read(case.image.tobytes(), case.image.size)


@lru_cache(maxsize=8)
def _read(pixels: bytes, size: tuple[int, int]) -> str:
    return reading.read_text(Image.frombytes("RGB", size, pixels))


@lru_cache(maxsize=4)
def _words(pixels: bytes, size: tuple[int, int]) -> list[Word]:
    """What is read in an unedited image, the same for all its arms."""
    return _as_words(reading.read_boxes(Image.frombytes("RGB", size, pixels)))


def _as_words(boxes: list[tuple[str, np.ndarray]]) -> list[Word]:
    return [Word(text, (*corners.min(0).tolist(), *corners.max(0).tolist())) for text, corners in boxes]


def _space(case: Case, image: Image.Image) -> dict[str, float | None]:
    expected = case.expected_objects
    if not expected:
        return {"objects_invented": metrics.objects_invented(image, expected)}
    return {
        "centroid_error_px": metrics.centroid_error(image, expected),
        "object_iou": metrics.object_iou(image, case.target, expected),
        "iou_by_object": metrics.iou_by_object(image, case.target, expected),
        "objects_lost": metrics.objects_lost(image, expected),
        "objects_invented": metrics.objects_invented(image, expected),
        "relations_kept": metrics.relations_kept(image, expected),
    }


def _detail(case: Any, image: Image.Image) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    mask, target = case.edit_mask, case.target
    if mask is not None and not mask.all():
        unedited = metrics.shrink(~mask)
        values = {
            "unedited_ssim": metrics.masked_ssim(image, case.image, unedited),
            "unedited_psnr_db": min(metrics.masked_psnr(image, case.image, unedited), BEST_PSNR),
            "unedited_texture": metrics.texture_kept(image, case.image, unedited),
        }
        for net in WEIGHTS:
            if not lpips_missing(net):
                values[f"unedited_lpips_{net}"] = lpips(image, case.image, net, ~mask)
    if target is not None:
        values["target_difference"] = metrics.mean_abs_difference(image, target)
        if mask is not None and mask.any():
            values["edited_colour_error"] = metrics.colour_difference(image, target, mask)
            values["edited_ssim"] = metrics.masked_ssim(image, target, mask)
    return values


def _drift(case: Any, image: Image.Image) -> dict[str, float | None]:
    drift = measure_drift(image, case.image)
    if drift is None:
        return {}
    return {
        "drift_shift_px": drift.shift_px,
        "drift_scale_percent": abs(drift.scale - 1) * 100,
        "drift_rotation_deg": abs(drift.rotation_deg),
    }


def _box_iou(image: Image.Image, boxes: Sequence[tuple[str, tuple[float, float, float, float]]]) -> float:
    """Mean IoU of each expected box (colour; left, top, right, bottom in px) and its colour's best patch."""
    from scipy.ndimage import find_objects, label

    nearest = metrics.colour_map(image)
    best = []
    for colour, (left, top, right, bottom) in boxes:
        patches, _ = label(nearest == list(COLOURS).index(colour))
        overlaps = [0.0]
        for down, across in find_objects(patches):
            width = min(right, across.stop) - max(left, across.start)
            height = min(bottom, down.stop) - max(top, down.start)
            shared = max(width, 0) * max(height, 0)
            areas = (right - left) * (bottom - top)
            areas += (across.stop - across.start) * (down.stop - down.start)
            overlaps.append(shared / (areas - shared))
        best.append(max(overlaps))
    return float(np.mean(best))
