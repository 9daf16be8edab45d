"""From records to rows, a table and curves: paired differences over cases, seeds averaged within a case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from qwen_vision_bridge.case import GROUPS
from qwen_vision_bridge.evaluation.metrics.registry import METRICS
from qwen_vision_bridge.evaluation.statistics import BASELINE, Difference, compare_arms
from qwen_vision_bridge.io import write_image
from qwen_vision_bridge.plots import to_image

Record = dict[str, Any]
Row = dict[str, Any]
Names = Mapping[str, tuple[str, int]]
"""Name and training seed of a design by the name of its arm."""
CONTROLS = ("shuffled", "target-only")
SHOWN = {
    "perception": ("letters", "answered", "location_error"),
    "edit": ("right", "target_difference", "unedited_ssim"),
}


def rows_of(records: Sequence[Record], names: Names, against: str = BASELINE) -> list[Row]:
    """One row an arm, group, difficulty and metric; beside a control the headline metrics alone."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for name, seed in names.values():
        seeds[name].add(seed)
    rows = []
    for difference in differences(records, names, against):
        if against == BASELINE or difference.metric in SHOWN[difference.level]:
            row = difference._asdict()
            row |= {"gain": row.pop("level"), "diff": row.pop("difference"), "against": against}
            rows.append({**row, "seeds": sorted(seeds[difference.arm])})
    return rows


def differences(records: Sequence[Record], names: Names, against: str = BASELINE) -> list[Difference]:
    """Every arm but the baseline beside it or another one, with seeds averaged within a case."""
    rows = compare_arms(average_seeds(records, names), METRICS, GROUPS, against=against)
    return [row for row in rows if row.arm != BASELINE]


def average_seeds(records: Sequence[Record], names: Names) -> list[Record]:
    """One record a case and design: the mean of every metric over the training seeds.

    `statistics.mean` is exact: three seeds that agree with the baseline differ from it by nothing at all.
    """
    alike: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        design, _ = names.get(record["arm"], (record["arm"], 0))
        alike[record["level"], record["case_id"], design].append(record)
    averaged = []
    for (_, _, design), several in alike.items():
        metrics = {
            metric: mean(values)
            for metric in several[0]["metrics"]
            if (values := [one["metrics"][metric] for one in several if metric in one["metrics"]])
        }
        averaged.append({**several[0], "arm": design, "metrics": metrics})
    return averaged


def level_shares(records: Sequence[Record], names: Names) -> list[Row]:
    """The mean weight of each level in the edits of every arm, by group."""
    weights: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if record.get("level_weights"):
            weights[names[record["arm"]][0], record["group"]].append(record["level_weights"])
    return [
        {"arm": arm, "group": group, "n": len(several)}
        | {level: float(np.mean([one[level] for one in several])) for level in several[0]}
        for (arm, group), several in sorted(weights.items())
    ]


def table(rows: Sequence[Row]) -> str:
    """The headline metrics as a table in Markdown."""
    lines = [
        "| gain | group | difficulty | arm | metric | n | seeds | baseline | value | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["metric"] in SHOWN[row["gain"]]:
            few = row["ci_low"] is None
            interval = "n too small" if few else f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
            difference = f"{row['diff']:+.3f} {interval}"
            numbers = f"{row['n']} | {len(row['seeds'])} | {row['baseline']:.3f} | {row['value']:.3f}"
            named = f"{row['gain']} | {row['group']} | {row['difficulty']} | {row['arm']} | {row['metric']}"
            lines.append(f"| {named} | {numbers} | {difference} |")
    return "\n".join(lines) + "\n"


def draw_curve(points: Sequence[tuple[float, Row]], path: Path, name: str, log: bool = False) -> None:
    """Difference in letters read, in points, over x or its logarithm, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(points, key=lambda point: point[0])
    x = np.array([value for value, _ in ordered])
    middle, low, high = (
        np.array([100 * (row["diff"] if row[field] is None else row[field]) for _, row in ordered])
        for field in ("diff", "ci_low", "ci_high")
    )
    axis.errorbar(x, middle, yerr=[middle - low, high - middle], fmt="o-", capsize=3)
    axis.axhline(0, color="grey", linewidth=0.8)
    if log:
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{one:g}" for one in x], minor=False)
        axis.minorticks_off()
        axis.tick_params(axis="x", labelrotation=30)
    axis.set(xlabel=name, ylabel="letters: points over the baseline")
    write_image(path, to_image(figure))
