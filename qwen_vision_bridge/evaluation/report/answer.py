"""The answer of a run in a sentence: does the bridge make edits better here?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import numpy as np

from ..evaluate import Evaluation
from ..metrics.registry import METRICS, STATED, verdict_of
from ..statistics import BASELINE, FEW, by_case, interval_of

Record = Mapping[str, Any]
Value = Callable[[Mapping[str, float]], float | None]

UNKNOWN = (
    "Nothing is known of what these images should become: what changed is measured, and not whether it is "
    "better."
)
MEASURES = {
    "right": "right",
    "answered": "answered",
    "exact_text": "text as stated",
    "edited_ssim": "edited region like the target (SSIM)",
    "target_difference": "difference from the target (of 255, lower is better)",
    "box_iou": "boxes as stated (IoU)",
    "unedited_ssim": "region outside the mask kept (SSIM)",
}
"""Headline metrics in words."""


class Answer(NamedTuple):
    """What a run says of one arm."""

    arm: str
    verdict: Literal["yes", "no", "open"]
    """`open` where the run cannot tell."""
    text: str
    """A sentence with its numbers."""
    beyond: str = ""
    """How much more the arm gains than its controls, where that can be compared."""


@dataclass(frozen=True, eq=False)
class Gain:
    """Paired values of two arms over the same cases."""

    values: np.ndarray
    """(n, 2): the other arm's, then the arm's."""

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(np.sort(self._differences).mean())

    @cached_property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """95 % bootstrap interval of the mean difference; None where there are too few cases."""
        return interval_of(self._differences)

    @property
    def _differences(self) -> np.ndarray:
        return self.values[:, 1] - self.values[:, 0]


def bridges_of(evaluation: Evaluation) -> list[str]:
    """Names of the arms that are no controls: bridges on the image's own features first, else any other."""
    arms = [arm for arm in evaluation.arms if arm["name"] != BASELINE]
    own = [arm["name"] for arm in arms if arm.get("features") == "own"]
    return own or [arm["name"] for arm in arms if "features" not in arm]


def answers_of(evaluation: Evaluation) -> list[Answer]:
    """One answer a bridge, over the edits of all groups together."""
    bridges = bridges_of(evaluation)
    arms = [arm["name"] for arm in evaluation.arms if arm["name"] != BASELINE]
    controls = [name for name in arms if name not in bridges]
    edits = [record for record in evaluation.records if record["level"] == "edit" and not record["error"]]
    if not edits:
        return [Answer("", "open", "Cannot be told: this run has no edits.")]
    if not bridges:
        return [
            Answer("", "open", "Cannot be told: no arm of this run is a bridge on the image's own features.")
        ]
    return [_answer(edits, arm, controls) for arm in bridges]


def _answer(edits: Sequence[Record], arm: str, controls: Sequence[str]) -> Answer:
    judged = _paired(edits, BASELINE, arm, verdict_of)
    if judged.count:
        return _of_verdicts(edits, arm, controls, judged)
    for metric in STATED:
        stated = _paired(edits, BASELINE, arm, methodcaller("get", metric))
        if stated.count:
            return _of_values(arm, metric, stated)
    return Answer(arm, "open", f"Cannot be told. {UNKNOWN}")


def _of_verdicts(edits: Sequence[Record], arm: str, controls: Sequence[str], gain: Gain) -> Answer:
    """From edits that are right or wrong."""
    name, count = _called(arm), gain.count
    if gain.interval[0] is None:
        before, after = gain.values.sum(0).astype(int).tolist()
        cases = "1 case is" if count == 1 else f"{count} cases are"
        counts = f"{name} gets {after} of {count} edits right, the baseline {before} of {count}"
        return Answer(arm, "open", f"Cannot be told: {cases} too few. {_sentence(counts)}.")
    before, after = 100 * gain.values.mean(0)
    shares = f"{name} gets {after:.0f} % of {count} edits right, the baseline {before:.0f} %"
    verdict, lead, why = _verdict(gain)
    text = f"{lead} {shares}, {100 * gain.mean:+.1f} points ({_interval(gain, 100, 1)}, n = {count}){why}."
    beyond = [
        f"{100 * over.mean:+.1f} points beyond {control} ({_interval(over, 100, 1)}{_apart(over)})"
        for control in controls
        if (over := _paired(edits, control, arm, verdict_of)).interval[0] is not None
    ]
    return Answer(arm, verdict, text, f"Beside its controls: {', '.join(beyond)}." if beyond else "")


def _of_values(arm: str, metric: str, gain: Gain) -> Answer:
    """From a metric of what the cases state, where none of them is right or wrong as a whole."""
    (before, after), name = gain.values.mean(0), _called(arm)
    values = f"{MEASURES[metric]}: {name} {after:.3f}, the baseline {before:.3f}"
    if metric == "unedited_ssim":
        return Answer(
            arm,
            "open",
            f"Cannot be told: the cases say what must stay and not what must come. {_sentence(values)}.",
        )
    if gain.interval[0] is None:
        cases = "1 case is" if gain.count == 1 else f"{gain.count} cases are"
        return Answer(arm, "open", f"Cannot be told: {cases} too few. {_sentence(values)}.")
    verdict, lead, why = _verdict(gain, METRICS[metric].higher_is_better is False)
    text = f"{lead} {values}, {gain.mean:+.3f} ({_interval(gain, 1, 3)}, n = {gain.count}){why}."
    return Answer(arm, verdict, text)


def _verdict(gain: Gain, lower: bool = False) -> tuple[Literal["yes", "no", "open"], str, str]:
    """Verdict, first words and last words."""
    low, high = gain.interval
    if low is None or high is None or low <= 0 <= high:
        return "open", "Cannot be told from this run:", "" if low == high else "; the interval includes 0"
    if gain.count < FEW:
        return (
            "open",
            "Cannot be told yet:",
            f"; an interval of fewer than {FEW} cases is too narrow to be believed",
        )
    return ("no", "No, worse:", "") if (high < 0) != lower else ("yes", "Yes:", "")


def _paired(edits: Sequence[Record], against: str, arm: str, value: Value) -> Gain:
    """Values of both arms, by case id."""
    pairs = []
    for _, arms in sorted(by_case(edits).get((), {}).items()):
        if {against, arm} <= set(arms):
            pair = [value(arms[name]["metrics"]) for name in (against, arm)]
            pairs += [pair] if None not in pair else []
    return Gain(np.array(pairs, dtype=float).reshape(-1, 2))


def _interval(gain: Gain, scale: float, digits: int) -> str:
    low, high = gain.interval
    if low is None or high is None or low == high:
        return "no case differs" if low == 0 else "every case differs alike"
    return f"95 % interval {scale * low:+.{digits}f} to {scale * high:+.{digits}f}"


def _apart(gain: Gain) -> str:
    low, high = gain.interval
    return ", not told apart" if low is not None and high is not None and low <= 0 <= high else ""


def _called(arm: str) -> str:
    return "the bridge" if arm == "bridge" else arm


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
