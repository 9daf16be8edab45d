"""A run's cases on one labelled sheet: prompt, input, target, and every edit with its verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...io import write_image
from ...plots import DPI, drawable, fonts, to_image
from ..evaluate import Evaluation
from ..metrics.registry import verdict_of
from ..statistics import BASELINE, Cases
from .answer import bridges_of
from .cards import MARKS, edits_by_case, outcome_counts, reference_files

MOST = 24  # cases on a sheet
ABREAST = 6  # cases from which on two stand side by side
PANEL_INCHES = 1.5
PROMPT_WIDTH = 26  # characters a line
INK = {"✓": "#0b5a9c", "✗": "#a84300", "–": "0.4"}


def write_overview(folder: str | Path, evaluation: Evaluation) -> Path | None:
    """Write `overview.png` into a run's folder; None where the run has no edit.

    Raises:
        OSError: an image of the run is not there any more.
    """
    folder = Path(folder)
    cases, arms = edits_by_case(evaluation), [BASELINE, *bridges_of(evaluation)]
    if not cases:
        return None
    chosen = evenly([cases[name] for name in sorted(cases, key=lambda name: (_group(cases[name]), name))])
    sheet = overview_sheet(folder, chosen, arms, _title(cases, arms))
    return write_image(folder / "overview.png", sheet, evaluation.provenance)


def evenly(cases: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most so many of some cases, evenly spaced, so that none is picked for what it shows."""
    places = np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int))
    return [cases[place] for place in places]


def overview_sheet(
    folder: Path, cases: Sequence[Mapping[str, Mapping[str, Any]]], arms: Sequence[str], title: str
) -> Image.Image:
    """Draw the sheet.

    Args:
        folder: of the run, with its images.
        cases: records of the edits, by arm.
        arms: whose edits are shown, the baseline first.
        title: of the sheet.
    """
    rows = [_panels(folder, case, arms) for case in cases]
    references = max(sum(name.startswith("reference") for name, *_ in row) for row in rows)
    before = [f"reference {number}" for number in range(1, references + 1)]
    known = {name for row in rows for name, *_ in row}
    columns = [*before, "input", *({"target"} & known), *arms]
    abreast = 2 if len(rows) > ABREAST else 1
    down = -(-len(rows) // abreast)
    widths = [1.25, *[1.0] * len(columns)] * abreast
    size = (PANEL_INCHES * sum(widths) + 0.3, (PANEL_INCHES + 0.28) * down + 0.7)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, int(16 * sum(widths)))), fontsize=11)
    axes: Any = figure.subplots(down, len(widths), width_ratios=widths, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
        first = (number // down) * (len(columns) + 1)
        line = axes[number % down, first : first + len(columns) + 1]
        _write_prompt(line[0], case[BASELINE])
        for name, image, sign, word in row:
            axis = line[1 + columns.index(name)]
            axis.imshow(image, interpolation="nearest")
            axis.set_title(f"{name} {sign} {word}".strip(), fontsize=8, color=INK.get(sign, "black"))
    return to_image(figure)


def _panels(
    folder: Path, case: Mapping[str, Mapping[str, Any]], arms: Sequence[str]
) -> list[tuple[str, Image.Image, str, str]]:
    """Name, image, and sign and word of the verdict."""
    first = case[BASELINE]
    stem = folder / first["group"] / first["case_id"]
    target = Path(f"{stem}_target.png")
    references = reference_files(stem)
    panels = [
        *((f"reference {number}", path, "", "") for number, path in enumerate(references, start=1)),
        ("input", Path(f"{stem}_input.png"), "", ""),
        *([("target", target, "", "")] if target.is_file() else []),
        *(
            (arm, folder / case[arm]["image"], *MARKS[verdict_of(case[arm]["metrics"])])
            for arm in arms
            if arm in case
        ),
    ]
    return [(name, _opened(path), sign, word) for name, path, sign, word in panels]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        shown = opened.convert("RGB")
    longest = int(2 * PANEL_INCHES * DPI)
    shown.thumbnail((longest, longest))
    return shown


def _write_prompt(axis: Axes, record: Mapping[str, Any]) -> None:
    lines = textwrap.wrap(drawable(record["prompt"]), PROMPT_WIDTH)
    shown = "\n".join(lines[:6]) + (" …" if len(lines) > 6 else "")
    style: Any = {"family": fonts(), "transform": axis.transAxes, "parse_math": False}
    axis.text(0, 0.95, shown, fontsize=8.5, va="top", **style)
    axis.text(0, 0.0, f"{record['group']} · {record['kind']}", fontsize=7, color="0.4", va="bottom", **style)


def _title(cases: Cases, arms: Sequence[str]) -> str:
    """How many cases there are, how many are shown, and what became of them."""
    shown = f"{MOST} of {len(cases)} cases, evenly spaced" if len(cases) > MOST else f"{len(cases)} cases"
    shown = "1 case" if len(cases) == 1 else shown
    parts = [shown]
    for arm in arms[1:]:
        counts = outcome_counts(cases, arm)
        if judged := sum(count for outcome, count in counts.items() if outcome != "open"):
            both = counts.get("both", 0)
            parts.append(
                f"right of {judged}: baseline {both + counts.get('loss', 0)}, {arm} "
                f"{both + counts.get('gain', 0)}"
            )
    return " · ".join(parts)


def _group(case: Mapping[str, Mapping[str, Any]]) -> str:
    return str(case[BASELINE]["group"])
