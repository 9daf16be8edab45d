"""From records to rows, a table and figures: paired differences over cases, seeds averaged within a case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from qwen_vision_bridge.evaluation.statistics import BASELINE, bootstrap_interval
from qwen_vision_bridge.io import write_whole

Record = dict[str, Any]
Row = dict[str, Any]
CONTROLS = ("shuffled", "target-only")
SHOWN = {
    "perception": ("letters", "answered", "location_error"),
    "edit": ("right", "target_difference", "unedited_ssim"),
}


def rows_of(records: Sequence[Record], gain: str, against: str = BASELINE) -> list[Row]:
    """One row an arm, group, difficulty and metric, beside the baseline; of a control, headline metrics.

    Args:
        records: with `arm`, `seed`, `group`, `difficulty`, `case` and `metrics`.
        gain: `perception` or `edit`.
    """
    values: dict[tuple, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for record in records:
        seeds[record["arm"], record["group"]].add(record["seed"])
        for metric, value in record["metrics"].items():
            for difficulty in (record["difficulty"], "all"):
                cases = values[record["group"], difficulty, metric][record["arm"]]
                cases.setdefault(record["case"], []).append(value)
    rows = []
    for (group, difficulty, metric), arms in sorted(values.items()):
        if against not in arms or (against != BASELINE and metric not in SHOWN[gain]):
            continue
        for arm, cases in sorted(arms.items()):
            if arm not in (against, BASELINE):
                rows.append(
                    {"arm": arm, "group": group, "difficulty": difficulty, "gain": gain, "metric": metric}
                    | _paired(arms[against], cases)
                    | {"seeds": sorted(seeds[arm, group]), "against": against}
                )
    return rows


def _paired(before: dict[str, list[float]], after: dict[str, list[float]]) -> Row:
    both = sorted(before.keys() & after.keys())
    # statistics.mean is exact: three seeds that say what the baseline says have no difference at all
    pairs = np.array([[mean(before[case]), mean(after[case])] for case in both])
    differences = pairs[:, 1] - pairs[:, 0]
    low, high = bootstrap_interval(differences)
    return {
        "n": len(both),
        "baseline": float(pairs[:, 0].mean()),
        "value": float(pairs[:, 1].mean()),
        "diff": float(differences.mean()),
        "ci_low": low,
        "ci_high": high,
    }


def level_shares(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The mean weight of each level in the edits of every arm, by group."""
    weights: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if record["level_weights"]:
            weights[record["arm"], record["group"]].append(record["level_weights"])
    return [
        {"arm": arm, "group": group, "n": len(found)}
        | {level: float(np.mean([one[level] for one in found])) for level in found[0]}
        for (arm, group), found in sorted(weights.items())
    ]


def table(rows: Sequence[Row]) -> str:
    """The headline metrics as a table in Markdown."""
    lines = [
        "| gain | group | difficulty | arm | metric | n | seeds | baseline | value | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["metric"] in SHOWN[row["gain"]]:
            difference = f"{row['diff']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
            numbers = f"{row['n']} | {len(row['seeds'])} | {row['baseline']:.3f} | {row['value']:.3f}"
            named = f"{row['gain']} | {row['group']} | {row['difficulty']} | {row['arm']} | {row['metric']}"
            lines.append(f"| {named} | {numbers} | {difference} |")
    return "\n".join(lines) + "\n"


def draw_differences(rows: Sequence[Row], path: Path, gain: str, metric: str) -> None:
    """Each arm's difference to the baseline with its interval, a panel a group, hard cases beside all."""
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["gain"] == gain and row["metric"] == metric]
    groups = sorted({row["group"] for row in chosen})
    arms = sorted({row["arm"] for row in chosen}, reverse=True)
    if not groups:
        return
    figure = Figure(figsize=(4 * len(groups), 0.4 * len(arms) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, group in zip(panels, groups, strict=True):
        for difficulty, colour, above in (("all", "0.5", 0.12), ("hard", "#15d", -0.12)):
            part = [row for row in chosen if (row["group"], row["difficulty"]) == (group, difficulty)]
            middle = np.array([100 * row["diff"] for row in part])
            low, high = (np.array([100 * row[end] for row in part]) for end in ("ci_low", "ci_high"))
            places = [arms.index(row["arm"]) + above for row in part]
            axis.errorbar(
                middle,
                places,
                xerr=[middle - low, high - middle],
                fmt="o",
                markersize=4,
                capsize=2,
                color=colour,
                label=f"{difficulty} cases",
            )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{group}: {metric}", xlabel="points over the baseline")
        axis.set_yticks(range(len(arms)), arms)
    panels[-1].legend(fontsize=8, loc="best")
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def draw_curve(
    points: Sequence[tuple[float, float, float, float]], path: Path, name: str, log: bool = False
) -> None:
    """A curve of (x, difference, low, high), in points of letters, over x or its logarithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    x, middle, low, high = (np.array(column) for column in zip(*sorted(points), strict=True))
    axis.errorbar(x, 100 * middle, yerr=[100 * (middle - low), 100 * (high - middle)], fmt="o-", capsize=3)
    axis.axhline(0, color="grey", linewidth=0.8)
    if log:
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{one:g}" for one in x], minor=False)
        axis.minorticks_off()
        axis.tick_params(axis="x", labelrotation=30)
    axis.set(xlabel=name, ylabel="letters: points over the baseline")
    write_whole(path, lambda file: figure.savefig(file, dpi=120))
