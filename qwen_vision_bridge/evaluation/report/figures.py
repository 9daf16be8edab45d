"""Figures of an evaluation: differences with their intervals, case by case, beside what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...plots import DPI, to_image
from ..metrics.registry import METRICS, STATED
from ..statistics import BASELINE, FEWEST, Difference, Expectation, bootstrap_interval

SPREAD = {
    "ocr": "edit_similarity",
    "space": "iou_by_object",
    "detail": "edited_ssim",
    "consistency": "edited_ssim",
    "other": "drift_shift_px",
}
"""What is drawn case by case in each group: finer than right or wrong, which has three differences only."""
BETTER, WORSE, SAME, POINT = "#0b62a8", "#d9730d", "#c9ccd4", "#222222"  # told apart by the colour-blind too
SIGNS = {BETTER: ("+", "^", ""), SAME: ("=", "o", ""), WORSE: ("−", "v", "////")}
"""Sign, marker and hatch of each colour: none is told by its colour alone."""
FIGURES = ("differences.png", "wins.png", "gains_by_case.png", "expectations.png")
MARKERS = {"reached": "^", "not reached": "v", "not resolved by this sample": "o"}
MANY = 12  # cases from which on their distribution is drawn behind the dots


def evaluation_figures(
    rows: Sequence[Difference], expected: Sequence[Expectation], records: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, Image.Image]]:
    """Every figure that the results have something for: file name → what it shows, and the image.

    Too few cases for an interval, or cases that do not differ at all, draw nothing: the table says it.

    Args:
        rows: the headlines.
        expected: gains that were expected, beside the measured ones.
        records: of the whole run.
    """
    shares = [row for row in rows if METRICS[row.metric].is_share]
    known = [row for row in shares if row.ci_low is not None]
    wanted = [row for row in expected if row.measured.ci_low is not None]
    apart = any(row.wins or row.losses for row in rows)
    differences = "Paired differences with their 95 % intervals, by group and arm"
    by_case = "Differences case by case, with mean and 95 % interval"
    expectations = "Measured gains with their intervals, and what was expected (shaded)"
    table: list[tuple[str, Callable[[Any], Image.Image], Any]] = [
        (differences, difference_figure, known if apart else []),
        ("Cases won, tied and lost against the baseline", wins_figure, rows if apart else []),
        (by_case, cases_figure, case_differences(records)),
        (expectations, expectations_figure, wanted),
    ]
    return {
        name: (words, draw(data)) for name, (words, draw, data) in zip(FIGURES, table, strict=True) if data
    }


def difference_figure(rows: Sequence[Difference]) -> Image.Image:
    """Paired differences with their 95 % intervals, one line a level, group and arm."""
    labels = [_label(row) for row in rows]
    figure, axis, places = _lines(labels, "Gain over the baseline", "difference in the share that is right")
    for place, row in zip(places, rows, strict=True):
        _interval(axis, place, row)
    axis.axvline(0, color="0.7", linewidth=1, zorder=0)
    return to_image(figure)


def expectations_figure(rows: Sequence[Expectation]) -> Image.Image:
    """What was expected as a shaded range, what was measured as a point with its interval."""
    labels = [f"{_label(of)}\n{verdict}" for of, *_, verdict in rows]
    figure, axis, places = _lines(
        labels, "Measured gain, and what was expected (shaded)", "difference in the share that is right", 0.5
    )
    for place, (of, low, high, verdict) in zip(places, rows, strict=True):
        axis.barh(place, max(high - low, 0.004), 0.7, low, color="#f3d9a4", zorder=0)
        _interval(axis, place, of, MARKERS[verdict])
    axis.axvline(0, color="0.7", linewidth=1, zorder=0)
    return to_image(figure)


def wins_figure(rows: Sequence[Difference]) -> Image.Image:
    """Shares of the cases in which an arm does better, as well, or worse than the baseline."""
    below = "share of cases: + better, = the same, − worse (hatched)"
    figure, axis, places = _lines([_label(row) for row in rows], "Cases against the baseline", below)
    for place, row in zip(places, rows, strict=True):
        left = 0.0
        for count, colour in ((row.wins, BETTER), (row.ties, SAME), (row.losses, WORSE)):
            share, (sign, _, hatch) = count / row.n, SIGNS[colour]
            axis.barh(place, share, 0.75, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            if share > 0.06:
                style: Any = {"ha": "center", "va": "center", "fontsize": 7, "color": "black"}
                style["bbox"] = {"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0}
                axis.text(left + share / 2, place, f"{sign}{count}", **style)
            left += share
    axis.set_xlim(0, 1)
    return to_image(figure)


def case_differences(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Group → arm → (n,) differences from the baseline of the group's metric in `SPREAD`, by case id.

    A group has its arms with cases enough for an interval, and is left out where none of them differs.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        value = record["metrics"].get(SPREAD.get(record["group"], ""))
        if record["level"] == "edit" and value is not None:
            table.setdefault(record["group"], {}).setdefault(record["arm"], {})[record["case_id"]] = value
    by_group: dict[str, dict[str, np.ndarray]] = {}
    for group, arms in table.items():
        known = arms.get(BASELINE, {})
        for arm, values in arms.items():
            both = sorted(values.keys() & known.keys())
            if arm != BASELINE and len(both) >= FEWEST:
                differences = np.array([values[case] - known[case] for case in both])
                by_group.setdefault(group, {})[arm] = differences
    return {group: arms for group, arms in by_group.items() if any(map(np.any, arms.values()))}


def cases_figure(spread: Mapping[str, Mapping[str, np.ndarray]]) -> Image.Image:
    """A panel a group: each case a dot, their distribution behind them, mean and interval beside."""
    widest = max(len(arms) for arms in spread.values())
    height = 2.4 * len(spread) + 0.3
    figure = Figure(figsize=(max(1.3 * widest + 1.2, 5.0), height), dpi=DPI, layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(spread), 1))
    for axis, (group, arms) in zip(axes, spread.items(), strict=True):
        for place, (arm, differences) in enumerate(arms.items()):
            _dots(axis, place, differences, arm, METRICS[SPREAD[group]].higher_is_better is not False)
        axis.axhline(0, color="0.7", linewidth=1, zorder=0)
        axis.set_xlim(-0.6, len(arms) - 0.2)
        counts = [f"{arm}\nn={len(differences)}" for arm, differences in arms.items()]
        axis.set_xticks(range(len(arms)), counts, fontsize=8)
        metric, higher = SPREAD[group].replace("_", " "), METRICS[SPREAD[group]].higher_is_better
        signs = f"▲ better, ▼ worse; {'higher' if higher else 'lower'} is better"
        axis.set_title(f"{group}: difference from the baseline in {metric}\n{signs}", fontsize=9, loc="left")
        axis.tick_params(axis="y", labelsize=7)
    return to_image(figure)


def _dots(axis: Axes, place: int, differences: np.ndarray, name: str, higher: bool) -> None:
    if len(differences) >= MANY and np.ptp(differences) > 0:
        drawn = axis.violinplot(differences, [place], widths=0.7, showextrema=False)
        bodies: Any = drawn["bodies"]
        for body in bodies:
            body.set(facecolor="#b9bcc6", alpha=0.5)
    aside = np.random.default_rng(len(name)).uniform(-0.16, 0.16, len(differences))
    size = 12 if len(differences) >= MANY else 26
    gains = differences if higher else -differences
    for colour, some in ((SAME, gains == 0), (BETTER, gains > 0), (WORSE, gains < 0)):
        style: Any = {"s": size, "color": colour, "marker": SIGNS[colour][1], "alpha": 0.75, "linewidths": 0}
        axis.scatter(place + aside[some], differences[some], **style)
    low, high = bootstrap_interval(differences)
    axis.plot([place + 0.3] * 2, [low, high], color=POINT, linewidth=2)
    axis.scatter([place + 0.3], [differences.mean()], s=22, color=POINT, marker="D", zorder=3)


def _label(row: Difference) -> str:
    metric = f" · {row.metric}" if row.metric in STATED else ""  # several of a group, else the headline alone
    return f"{row.level} · {row.group} · {row.arm}{metric} (n={row.n})"


def _lines(
    labels: Sequence[str], title: str, below: str, each: float = 0.28
) -> tuple[Figure, Axes, list[int]]:
    """A figure with one labelled line a row, the first at the top."""
    figure = Figure(figsize=(7.5, 1.3 + each * len(labels)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    places = list(range(len(labels)))[::-1]
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_ylim(-0.6, len(labels) - 0.4)
    axis.set_xlabel(below, fontsize=9)
    return figure, axis, places


def _interval(axis: Axes, place: int, row: Difference, marker: str = "o") -> None:
    if row.ci_low is not None and row.ci_high is not None:
        axis.plot([row.ci_low, row.ci_high], [place, place], color="0.35", linewidth=2, zorder=1)
    axis.scatter([row.difference], [place], s=30, color=BETTER, marker=marker, zorder=2)
