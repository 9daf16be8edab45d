"""What a run evaluation, as files for machines and as tables for people."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from ...io import write_json, write_text
from ...loading.registry import FAMILIES
from ...synthetic.cases import KINDS
from ..evaluate import Evaluation
from ..metrics.registry import HEADLINES, METRICS, STATED
from ..statistics import BASELINE, Difference, Expectation, by_case, caution, judge_expectations
from .answer import UNKNOWN, answers_of

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
OUTSIDE = (
    "The miniature knows its synthetic world alone: what it does to photographs and other images shows that "
    "everything runs, and nothing of what Qwen-Image-Edit would do to them."
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
        "answers": [answer._asdict() for answer in answers_of(evaluation)],
        "left_out": evaluation.left_out,
        "summary": [row._asdict() for row in evaluation.rows],
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
        interval=interval_words,
        outside=outside_world(evaluation),
        answers=answers_of(evaluation),
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
    """One row a level, group and arm: the headline metric over all its cases.

    A group of edits in which no case knows all that is right has a row for each metric of `STATED`.
    """
    rows = [row for row in evaluation.rows if row.difficulty == "all"]
    judged = {(row.level, row.group) for row in rows if row.metric == HEADLINES.get(row.level)}
    return [
        row
        for row in rows
        if row.metric == HEADLINES.get(row.level)
        or (row.level == "edit" and row.metric in STATED and (row.level, row.group) not in judged)
    ]


def warning(evaluation: Evaluation) -> str:
    """What the run cannot carry, in a sentence or two; "" where nothing is in the way."""
    headlines = headline_rows(evaluation)
    return caution(headlines) if headlines else UNKNOWN


def outside_world(evaluation: Evaluation) -> str:
    """A sentence where models that know their synthetic world alone were given other images; else ""."""
    family = FAMILIES.get(str(evaluation.provenance.get("family")))
    known = {kind for kinds in KINDS.values() for kind in kinds}
    others = any(record["kind"] not in known for record in evaluation.records)
    return OUTSIDE if family is not None and family.synthetic_only and others else ""


def interval_words(row: Difference, form: str = "{:+.3f} to {:+.3f}", scale: float = 1) -> str:
    """A row's interval, or why there is none."""
    if row.ci_low is None or row.ci_high is None:
        return "n too small"
    if (
        row.ci_low == row.ci_high
    ):  # every case differs by the same, and resampling cannot see that it might not
        return "none differs" if row.ci_low == 0 else "all the same"
    return form.format(scale * row.ci_low, scale * row.ci_high)


def as_table(evaluation: Evaluation) -> str:
    """The headlines as a short plain table, with a word of caution; without a truth, what changed."""
    headlines, outside = headline_rows(evaluation), outside_world(evaluation)
    if not headlines:
        lines = [f"{'group':12} {'arm':12} {'metric':22} {'n':>3} {'baseline':>9} {'arm':>9}"]
        for row in (row for row in evaluation.rows if row.difficulty == "all"):
            labels = f"{row.group:12} {row.arm:12} {row.metric:22}"
            lines.append(f"{labels} {row.n:3d} {row.baseline:9.3f} {row.value:9.3f}")
        return "\n".join([*lines, *filter(None, [outside, UNKNOWN])])
    # Cases from files are judged by several metrics; the synthetic ones by one, which needs no column.
    width = 18 if any(row.metric in STATED for row in headlines) else 0
    lines = [
        f"{'level':11} {'group':12} {'arm':12} {'metric':{width}.{width}}{'n':>5} {'baseline':>9} {'arm':>7} "
        f"{'difference':>11} 95 % interval      p  win/tie/loss"
    ]
    for row in headlines:
        lines.append(
            f"{row.level:11} {row.group:12} {row.arm:12} {row.metric:{width}.{width}}{row.n:5d} "
            f"{row.baseline:9.3f} {row.value:7.3f} {row.difference:+11.3f} "
            f"{interval_words(row, '[{:+.3f}, {:+.3f}]'):16} {row.p_value:6.3f}  "
            f"{row.wins}/{row.ties}/{row.losses}"
        )
    failed = sum(record["error"] is not None for record in evaluation.records)
    lines += [f"{failed} of {len(evaluation.records)} tasks failed: see results.json"] if failed else []
    answers = [words for answer in answers_of(evaluation) for words in (answer.text, answer.beyond)]
    return "\n".join([*lines, *filter(None, [*answers, outside, warning(evaluation)])])


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
