"""The benchmark's figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from qwen_vision_bridge.plots import DPI, to_image


def stage_figure(rows: Sequence[dict[str, Any]], caption: str) -> Image.Image:
    """Time and peak memory of each stage, baseline beside enhanced.

    Args:
        rows: of the benchmark, named `stage, <stage>, <arm>[, peak GPU memory]`; times in ms, memory in GB.
    """
    by_name = {tuple(row["name"].split(", ")[1:]): row for row in rows}
    stages = list(dict.fromkeys(key[0] for key in by_name))
    kinds = [("ms", ()), *([("GB", ("peak GPU memory",))] if any(len(key) == 3 for key in by_name) else [])]
    figure = Figure(figsize=(5.5 * len(kinds), 1.4 + 0.42 * len(stages)), dpi=DPI, layout="constrained")
    for axis, (unit, suffix) in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        for offset, (arm, colour) in zip(
            (0.2, -0.2), (("baseline", "0.6"), ("enhanced", "#15d")), strict=True
        ):
            bars = [by_name.get((stage, arm, *suffix)) for stage in stages]
            values = [row["value"] if row else 0.0 for row in bars]
            places = [len(stages) - place + offset for place in range(len(stages))]
            axis.barh(places, values, 0.38, color=colour, label=arm)
        axis.set_yticks([len(stages) - place for place in range(len(stages))], stages, fontsize=9)
        axis.set_xlabel("time of one call, ms (log)" if unit == "ms" else "peak GPU memory, GB", fontsize=9)
        if unit == "ms":
            axis.set_xscale("log")
            axis.legend(fontsize=8)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return to_image(figure)
