"""What a run evaluation, as files for machines and as tables for people."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from ...io import write_json, write_text
from ..evaluate import Evaluation
from ..metrics.registry import HEADLINES, METRICS
from ..statistics import BASELINE, Difference, Expectation, by_case, caution, judge_expectations

LABELS = (
    *("level", "case_id", "group", "kind", "difficulty", "arm", "prompt"),
    *("seed", "seconds", "image", "reply", "answer", "error"),
)
TITLES = {
    "ocr": "OCR capability",
    "space": "Spatial reasoning",
    "detail": "Detail preservation",
    "consistency": "Consistency between images",
}
NO_TRUTH = (
    "Nothing is known of what these images should become: what changed is measured, and not whether it is "
    "better."
)
PHOTO_PROMPTS = {
    "ocr": (
        'Change the text to "HELLO"',
        'Add the words "Grüße aus Köln" at the top',
        "把文字改成“你好”",
        "Remove all text",
    ),
    "space": ("Move the main object to the left", "Move the main object to the right", "Mirror the scene"),
    "detail": (
        "Change the colour of the background",
        "Remove the background",
        "Make it look like a pencil drawing",
    ),
    "consistency": (),  # takes several images
}


class KindRow(NamedTuple):
    """One kind of case in one arm beside the baseline."""

    level: str
    group: str
    kind: str
    arm: str
    metric: str
    n: int
    baseline: float
    value: float


def kind_rows(evaluation: Evaluation) -> list[KindRow]:
    """Every kind of case in every arm: the headline metric, or the edited region's likeness to the right edit
    where no edit of that kind is judged. Too few cases a kind for an interval: it proves nothing."""
    records = [record for record in evaluation.records if record["level"] in HEADLINES]
    rows = []
    for (level, group, kind), cases in by_case(records, "level", "group", "kind").items():
        judged = any(HEADLINES[level] in of["metrics"] for arms in cases.values() for of in arms.values())
        metric = HEADLINES[level] if judged else "edited_ssim"
        for arm in [arm["name"] for arm in evaluation.arms if arm["name"] != BASELINE]:
            both = [arms for arms in cases.values() if {BASELINE, arm} <= set(arms)]
            values = [[arms[name]["metrics"].get(metric) for name in (BASELINE, arm)] for arms in both]
            if pairs := [pair for pair in values if None not in pair]:
                means = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
                rows.append(KindRow(level, group, kind, arm, metric, len(pairs), *means))
    return rows


def write_results(folder: str | Path, evaluation: Evaluation) -> None:
    """Write `results.json`, `results.csv` and `summary.md`, each whole or not at all."""
    folder = Path(folder)
    data = {
        "provenance": evaluation.provenance,
        "seconds": round(evaluation.seconds, 1),
        "records_of_an_earlier_run": evaluation.done_before,
        "arms": evaluation.arms,
        "expectations": [_as_data(*row) for row in expectations(evaluation)],
        "caution": warning(evaluation),
        "left_out": evaluation.left_out,
        # What no sample of one pair can resolve is infinite, which JSON has no word for.
        "summary": [
            {k: None if v == float("inf") else v for k, v in row._asdict().items()} for row in evaluation.rows
        ],
        "records": evaluation.records,
    }
    write_json(folder / "results.json", data)
    write_text(folder / "results.csv", _as_csv(evaluation))
    summary = render_template(
        "summary.md.jinja",
        caution=warning(evaluation),
        expectations=expectations(evaluation),
        rows=evaluation.rows,
        better={True: "higher", False: "lower", None: "neither"},
        kinds=kind_rows(evaluation),
        left_out=evaluation.left_out,
        provenance=json.dumps(evaluation.provenance, indent=2, ensure_ascii=False),
    )
    write_text(folder / "summary.md", summary)


def expectations(evaluation: Evaluation) -> list[Expectation]:
    """Expected gains beside the measured ones, for the arms that are no controls."""
    bridges = [arm["name"] for arm in evaluation.arms if arm.get("features") == "own"]
    return judge_expectations(evaluation.rows, HEADLINES, bridges)


def headline_rows(evaluation: Evaluation) -> list[Difference]:
    """One row a level, group and arm: the headline metric over all its cases."""
    rows = (row for row in evaluation.rows if row.difficulty == "all")
    return [row for row in rows if row.metric == HEADLINES.get(row.level)]


def warning(evaluation: Evaluation) -> str:
    """What the run cannot carry, in a sentence or two; "" where nothing is in the way."""
    return caution(evaluation.rows, HEADLINES) if headline_rows(evaluation) else NO_TRUTH


def as_table(evaluation: Evaluation) -> str:
    """The headlines as a short plain table, with a word of caution; without a truth, what changed."""
    if not headline_rows(evaluation):
        lines = [f"{'group':12} {'arm':12} {'metric':22} {'n':>3} {'baseline':>9} {'arm':>9}"]
        for row in (row for row in evaluation.rows if row.difficulty == "all"):
            labels = f"{row.group:12} {row.arm:12} {row.metric:22}"
            lines.append(f"{labels} {row.n:3d} {row.baseline:9.3f} {row.value:9.3f}")
        return "\n".join([*lines, NO_TRUTH])
    lines = [
        f"{'level':11} {'group':12} {'arm':12} {'n':>4} {'baseline':>9} {'arm':>7} {'difference':>11} "
        "95 % interval      p  win/tie/loss"
    ]
    for row in headline_rows(evaluation):
        lines.append(
            f"{row.level:11} {row.group:12} {row.arm:12} {row.n:4d} {row.baseline:9.3f} {row.value:7.3f} "
            f"{row.difference:+11.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}] {row.p_value:6.3f}  "
            f"{row.wins}/{row.ties}/{row.losses}"
        )
    failed = sum(record["error"] is not None for record in evaluation.records)
    lines += [f"{failed} of {len(evaluation.records)} tasks failed: see results.json"] if failed else []
    return "\n".join([*lines, *filter(None, [warning(evaluation)])])


def _as_data(measured: Difference, low: float, high: float, verdict: str) -> dict[str, object]:
    fields = ("level", "group", "arm", "metric", "n", "difference", "ci_low", "ci_high")
    data = {name: getattr(measured, name) for name in fields}
    return data | {"expected_low": low, "expected_high": high, "verdict": verdict}


def _as_csv(evaluation: Evaluation) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*LABELS, *METRICS])
    writer.writeheader()
    for record in evaluation.records:
        labels = {name: _inert(record.get(name)) for name in LABELS}
        writer.writerow({**labels, **record["metrics"]})
    return buffer.getvalue()


def _inert(value: object) -> object:
    """Text that a spreadsheet shows and does not run: a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def render_template(name: str, **values: object) -> str:
    """One of the templates of this folder; every value is escaped in HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(values)
