"""Cases of a run as cards of its page: every arm's image with its verdict, and where the levels were read."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluate import Evaluation
from ..metrics.registry import verdict_of
from ..statistics import BASELINE, Cases, by_case
from .answer import bridges_of

EACH = 4  # worst and best cases shown of every group and arm: a page of 500 cases would weigh too much
EXAMPLES = 3
THUMB = 256  # px: the longer side of an image in the page
MARKS = {1.0: ("✓", "right"), 0.0: ("✗", "wrong"), None: ("–", "not judged")}
"""Sign and word of a verdict."""
OUTCOMES = {
    "gain": "the arm is right, the baseline wrong",
    "both": "both are right",
    "loss": "the arm is wrong, the baseline right",
    "neither": "both are wrong",
    "open": "not judged",
}
"""What a case says of an arm, the most telling first."""
LEVEL_COLOURS = ("#e69f00", "#0072b2", "#f0e6ff")  # of Okabe and Ito, and a pale one: apart in brightness too
OPAQUE = 0.6  # of a level map over its image
Card = dict[str, Any]


def edits_by_case(evaluation: Evaluation) -> Cases:
    """The records of edits that have an image, by case id and arm; cases without a baseline are left out."""
    edits = [record for record in evaluation.records if record["level"] == "edit" and record["error"] is None]
    cases = by_case(edits).get((), {})
    return {case_id: arms for case_id, arms in cases.items() if BASELINE in arms}


def outcome_of(baseline: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """One of `OUTCOMES`."""
    before, after = verdict_of(baseline["metrics"]), verdict_of(record["metrics"])
    if before is None or after is None:
        return "open"
    return {(0, 1): "gain", (1, 1): "both", (1, 0): "loss", (0, 0): "neither"}[int(before), int(after)]


def gain_of(baseline: Mapping[str, float], arm: Mapping[str, float]) -> float:
    """How much better an arm's image is: by the verdict, then by what is left untouched and by distance."""
    order = (
        *(("right", 10.0), ("exact_text", 5.0), ("box_iou", 2.0)),
        *(("unedited_ssim", 1.0), ("target_difference", -1 / 255)),
    )
    return sum(
        weight * (arm[name] - baseline[name]) for name, weight in order if name in arm and name in baseline
    )


def case_cards(folder: Path, evaluation: Evaluation) -> tuple[list[Card], list[Card]]:
    """The telling examples, and the worst and best other cases of every group and arm."""
    cases = edits_by_case(evaluation)
    ranked: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case_id, arms in cases.items():
        for name, record in arms.items():
            if name != BASELINE:
                gain = gain_of(arms[BASELINE]["metrics"], record["metrics"])
                ranked.setdefault((record["group"], name), []).append((gain, case_id))
    best_and_worst = [pair for pairs in map(sorted, ranked.values()) for pair in pairs[:EACH] + pairs[-EACH:]]
    bridges = bridges_of(evaluation)
    telling = telling_cases(cases, bridges[0])[:EXAMPLES] if bridges else []
    others = sorted({case_id for _, case_id in best_and_worst} - set(telling))
    roles = {arm["name"]: "bridge" if arm["name"] in bridges else "control" for arm in evaluation.arms}
    examples, rest = ([_card(folder, cases[name], roles) for name in names] for names in (telling, others))
    return examples, rest


def telling_cases(cases: Cases, arm: str) -> list[str]:
    """Ids of all cases of an arm: one of each outcome, then the second of each, and so on.

    Within an outcome the largest gain comes first, of losses the largest loss.
    """
    ranked: dict[str, list[tuple[float, str]]] = {outcome: [] for outcome in OUTCOMES}
    for case_id, arms in cases.items():
        if arm in arms:
            outcome = outcome_of(arms[BASELINE], arms[arm])
            gain = gain_of(arms[BASELINE]["metrics"], arms[arm]["metrics"])
            ranked[outcome].append((gain if outcome == "loss" else -gain, case_id))
    in_turn = itertools.zip_longest(*(sorted(some) for some in ranked.values()))
    return [pair[1] for several in in_turn for pair in several if pair is not None]


def outcome_counts(cases: Cases, arm: str) -> dict[str, int]:
    """How many cases of an arm have each outcome; those that none has are left out."""
    found = [outcome_of(arms[BASELINE], arms[arm]) for arms in cases.values() if arm in arms]
    return {outcome: count for outcome in OUTCOMES if (count := found.count(outcome))}


def _card(folder: Path, arms: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str]) -> Card:
    first = arms[BASELINE]
    stem = folder / first["group"] / first["case_id"]
    target = Path(f"{stem}_target.png")
    return {
        "case_id": first["case_id"],
        "group": first["group"],
        "prompt": first["prompt"],
        "references": [_image(path) for path in reference_files(stem)],
        "input": _image(Path(f"{stem}_input.png")),
        "target": _image(target) if target.is_file() else "",
        "read": first.get("read_before"),
        "baseline": _arm(folder, stem, first, first, roles),
        "arms": [
            _arm(folder, stem, first, record, roles) for name, record in arms.items() if name != BASELINE
        ],
    }


def reference_files(stem: Path) -> list[Path]:
    """The images that came before a case's own, as the run wrote them."""
    numbered = (Path(f"{stem}_reference{number}.png") for number in itertools.count(1))
    return list(itertools.takewhile(Path.is_file, numbered))


def _arm(
    folder: Path, stem: Path, baseline: Mapping[str, Any], record: Mapping[str, Any], roles: Mapping[str, str]
) -> Card:
    sign, word = MARKS[verdict_of(record["metrics"])]
    drawn, weights = record.get("attention"), record.get("level_weights") or {}
    colours = dict(zip(weights, LEVEL_COLOURS, strict=False))
    return {
        "name": record["arm"],
        "role": roles.get(record["arm"], ""),
        "image": _image(folder / record["image"]),
        "sign": sign,
        "word": word,
        "notes": list(_notes(record["metrics"])),
        "read": record.get("read_after"),
        "gain": round(gain_of(baseline["metrics"], record["metrics"]), 6),
        "outcome": outcome_of(baseline, record),
        "levels": _level_map(Path(f"{stem}_input.png"), folder / drawn) if drawn else "",
        "legend": [(name, colours[name], weights[name]) for name in colours],
    }


def _notes(metrics: Mapping[str, float]) -> Iterable[str]:
    """What is measured of an edit whose case states a part of what is right."""
    if "right" in metrics:
        return
    if "exact_text" in metrics:
        yield "text ✓ as stated" if metrics["exact_text"] == 1 else "text ✗ not as stated"
    words = {
        "box_iou": "boxes: IoU {:.2f}",
        "edited_ssim": "like the target where edited: SSIM {:.2f}",
        "target_difference": "{:.1f} of 255 off the target",
        "unedited_ssim": "kept outside the mask: SSIM {:.2f}",
    }
    yield from (form.format(metrics[name]) for name, form in words.items() if name in metrics)


def _level_map(image: Path, levels: Path) -> str:
    """The levels' weights in their colours over the input in grey."""
    with Image.open(image) as opened, Image.open(levels) as drawn:
        shown = opened.convert("L").convert("RGB")
        weights = np.asarray(drawn.convert("RGB"), float)  # (gh, gw, 3)
    palette = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in LEVEL_COLOURS]
    colours = weights / np.maximum(weights.sum(-1, keepdims=True), 1) @ np.array(palette, float)
    shown.thumbnail((THUMB, THUMB))
    overlay = Image.fromarray(np.rint(colours).astype(np.uint8)).resize(shown.size, Image.Resampling.NEAREST)
    return embedded(Image.blend(shown, overlay, OPAQUE), THUMB)


def _image(path: Path) -> str:
    with Image.open(path) as opened:
        return embedded(opened.convert("RGB"), THUMB)


def embedded(image: Image.Image, longest: int) -> str:
    """An image as a data address: WebP, without loss where it is tiny."""
    shown = image.copy()
    shown.thumbnail((longest, longest))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=85, lossless=max(shown.size) <= 64)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def groups_of(cards: Sequence[Card]) -> list[str]:
    """The groups that some cards have."""
    return sorted({card["group"] for card in cards})
