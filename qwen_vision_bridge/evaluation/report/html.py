"""One self-contained HTML page of a run: it opens offline, and nothing in a prompt can run in it.

Jinja escapes every value, and the page's own policy allows no script or style but the two below, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...case import GROUPS, OTHER
from ...io import write_image, write_text
from ..evaluate import Evaluation
from ..metrics.registry import METRICS
from ..statistics import BASELINE, Difference
from .answer import MEASURES, answers_of, bridges_of
from .cards import EACH, OUTCOMES, case_cards, edits_by_case, embedded, groups_of, outcome_counts
from .figures import FIGURES, evaluation_figures
from .tables import (
    expectations,
    headline_rows,
    interval_words,
    kind_rows,
    outside_world,
    render_template,
    warning,
)

LEVELS = ("edit", "perception", "agreement")
RATES = ("right", "answered", "exact_text")  # shown in per cent: each case has it or has it not


def write_page(folder: str | Path, evaluation: Evaluation) -> Path:
    """Write `report.html` and its figures as PNG into a run's folder; its images are read from there.

    Raises:
        OSError: an image of the run is not there any more.
    """
    from markupsafe import Markup

    folder = Path(folder)
    rows = _bridges_first(headline_rows(evaluation), bridges_of(evaluation))
    figures = evaluation_figures(rows, expectations(evaluation), evaluation.records)
    for name in FIGURES:  # an earlier run of the folder may have had more cases
        (folder / name).unlink(missing_ok=True)
    for name, (_, figure) in figures.items():
        write_image(folder / name, figure, evaluation.provenance)
    cases, bridges = edits_by_case(evaluation), bridges_of(evaluation)
    examples, others = case_cards(folder, evaluation)
    here = Path(__file__).parent
    style, script = ((here / f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    page = render_template(
        "report.html.jinja",
        family=evaluation.provenance.get("family", "?"),
        provenance=evaluation.provenance,
        details=json.dumps(evaluation.provenance, indent=2, ensure_ascii=False),
        answers=answers_of(evaluation),
        caution=warning(evaluation) if rows else "",
        outside=outside_world(evaluation),
        rows=[_row(row, bridges) for row in rows],
        counts=outcome_counts(cases, bridges[0]) if bridges else {},
        outcomes=OUTCOMES,
        expectations=expectations(evaluation),
        examples=examples,
        others=others,
        total=len(cases),
        each=EACH,
        kinds=kind_rows(evaluation),
        changes=[(row, interval_words(row)) for row in evaluation.rows if row.difficulty == "all"],
        figures=[(words, embedded(figure, max(figure.size))) for words, figure in figures.values()],
        groups=groups_of(others),
        bridges=bridges,
        arms=[*bridges, *(arm["name"] for arm in evaluation.arms if arm["name"] not in [BASELINE, *bridges])],
        left_out=evaluation.left_out,
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )
    return write_text(folder / "report.html", page)


def _bridges_first(rows: Sequence[Difference], bridges: Sequence[str]) -> list[Difference]:
    """The rows of bridges before those of controls, edits before questions; else as they come."""
    groups = (*GROUPS, OTHER)
    return sorted(
        rows, key=lambda row: (row.arm not in bridges, LEVELS.index(row.level), groups.index(row.group))
    )


def _row(row: Difference, bridges: Sequence[str]) -> dict[str, Any]:
    """A headline in words: shares of cases in per cent, other metrics in their own unit."""
    rate = row.metric in RATES
    unit, form, scale = (" %", "{:.0f}", 100) if rate else ("", "{:.3f}", 1)
    signed = "{:+.1f}" if rate else "{:+.3f}"
    interval = interval_words(row, f"{signed} to {signed}", scale)
    return {
        "measure": MEASURES.get(row.metric, row.metric),
        "row": row,
        "is_bridge": row.arm in bridges,
        "baseline": form.format(scale * row.baseline) + unit,
        "value": form.format(scale * row.value) + unit,
        "difference": signed.format(scale * row.difference) + (" points" if rate else ""),
        "interval": interval,
        "p": f"{row.p_value:.3f}",
        "better": {True: "", False: " (lower is better)", None: ""}[METRICS[row.metric].higher_is_better],
    }


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
