"""What a run found, as files for machines and as tables for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...io import write_json, write_whole
from ..evaluate import Evaluation
from ..scoring import HEADLINES, METRICS
from ..statistics import BASELINE, Difference, Expectation, caution, judge_expectations

PLAIN = (
    "level",
    "case_id",
    "group",
    "kind",
    "difficulty",
    "arm",
    "prompt",
    "seed",
    "seconds",
    "image",
    "reply",
    "answer",
    "error",
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


def kind_rows(found: Evaluation) -> list[KindRow]:
    """Every kind of case in every arm: the headline metric, or the edited region's likeness to the right edit
    where no edit of that kind is judged. Too few cases a kind for an interval: it proves nothing."""
    table: dict[tuple[str, str, str], dict[str, dict[str, dict[str, float]]]] = {}
    for record in found.records:
        if record["level"] not in HEADLINES:
            continue
        cases = table.setdefault((record["level"], record["group"], record["kind"]), {})
        cases.setdefault(record["case_id"], {})[record["arm"]] = record["metrics"]
    rows = []
    for (level, group, kind), cases in table.items():
        judged = any(HEADLINES[level] in metrics for arms in cases.values() for metrics in arms.values())
        metric = HEADLINES[level] if judged else "edited_ssim"
        for arm in [arm["name"] for arm in found.arms if arm["name"] != BASELINE]:
            both = [
                (arms.get(BASELINE, {}).get(metric), arms.get(arm, {}).get(metric)) for arms in cases.values()
            ]
            pairs = [pair for pair in both if None not in pair]
            if pairs:
                means = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
                rows.append(KindRow(level, group, kind, arm, metric, len(pairs), *means))
    return rows


def write_results(folder: str | Path, found: Evaluation) -> None:
    """Write `results.json`, `results.csv` and `summary.md`, each whole or not at all."""
    folder = Path(folder)
    data = {
        "provenance": found.provenance,
        "seconds": round(found.seconds, 1),
        "records_of_an_earlier_run": found.done_before,
        "arms": found.arms,
        "expectations": [row._asdict() for row in expectations(found)],
        "caution": warning(found),
        "left_out": found.left_out,
        "summary": [_finite(row) for row in found.rows],
        "records": found.records,
    }
    write_json(folder / "results.json", data)
    for name, text in (("results.csv", _as_csv(found)), ("summary.md", _as_markdown(found))):
        write_whole(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def expectations(found: Evaluation) -> list[Expectation]:
    """The seed's expected gains beside the measured ones, for the arms that are no controls."""
    hopeful = [arm["name"] for arm in found.arms if arm.get("features") == "own"]
    return judge_expectations(found.rows, HEADLINES, hopeful)


def headline_rows(found: Evaluation) -> list[Difference]:
    """One row a level, group and arm: the headline metric over all its cases."""
    return [row for row in found.rows if row.difficulty == "all" and row.metric == HEADLINES.get(row.level)]


def warning(found: Evaluation) -> str:
    """What the run cannot carry, in a sentence or two; "" where nothing is in the way."""
    return caution(found.rows, HEADLINES) if headline_rows(found) else NO_TRUTH


def as_table(found: Evaluation) -> str:
    """The headlines as a short plain table, with a word of caution; without a truth, what changed."""
    if not headline_rows(found):
        return "\n".join([*_plain_changes(found), NO_TRUTH])
    lines = [
        f"{'level':11} {'group':12} {'arm':12} {'n':>4} {'baseline':>9} {'arm':>7} {'difference':>11} "
        "95 % interval      p  win/tie/loss"
    ]
    for row in headline_rows(found):
        lines.append(
            f"{row.level:11} {row.group:12} {row.arm:12} {row.n:4d} {row.baseline:9.3f} {row.value:7.3f} "
            f"{row.difference:+11.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}] {row.p_value:6.3f}  "
            f"{row.wins}/{row.ties}/{row.losses}"
        )
    failed = sum(record["error"] is not None for record in found.records)
    lines += [f"{failed} of {len(found.records)} jobs failed: see results.json"] if failed else []
    return "\n".join([*lines, *filter(None, [warning(found)])])


def _plain_changes(found: Evaluation) -> list[str]:
    """Every metric that needs no truth, an arm a line."""
    lines = [f"{'group':12} {'arm':12} {'metric':22} {'n':>3} {'baseline':>9} {'arm':>9}"]
    return lines + [
        f"{row.group:12} {row.arm:12} {row.metric:22} {row.n:3d} {row.baseline:9.3f} {row.value:9.3f}"
        for row in found.rows
        if row.difficulty == "all"
    ]


def _finite(row: Difference) -> dict[str, object]:
    """A row as JSON takes it: what no sample of one pair can resolve is null."""
    data = row._asdict()
    return {**data, "resolvable": None if data["resolvable"] == float("inf") else data["resolvable"]}


def _as_csv(found: Evaluation) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*PLAIN, *METRICS])
    writer.writeheader()
    for record in found.records:
        plain = {name: _inert(record.get(name)) for name in PLAIN}
        writer.writerow({**plain, **record["metrics"]})
    return buffer.getvalue()


def _inert(value: object) -> object:
    """Text that a spreadsheet shows and does not run: a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def _as_markdown(found: Evaluation) -> str:
    lines = ["# Evaluation", ""]
    if words := warning(found):
        lines += [f"**{words}**", ""]
    lines += [
        "## Expected and measured",
        "",
        "| level | group | arm | expected | n | measured | 95 % interval | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.level} | {row.group} | {row.arm} | +{row.expected_low:.2f} to +{row.expected_high:.2f} | "
        f"{row.n} | {row.difference:+.3f} | {row.ci_low:+.3f} to {row.ci_high:+.3f} | {row.verdict} |"
        for row in expectations(found)
    ]
    lines += _difference_table(found.rows) + _kind_table(kind_rows(found))
    lines += [
        "",
        "Points of the share that is right. Paired differences from the baseline, percentile "
        "bootstrap over cases; an interval that holds 0 shows no difference. *Resolvable* is the "
        "smallest difference that a sample like this finds 4 times in 5.",
        "",
    ]
    lines += [f"- left out: {line}" for line in found.left_out]
    provenance = json.dumps(found.provenance, indent=2, ensure_ascii=False)
    return "\n".join([*lines, "", "```json", provenance, "```", ""])


def _kind_table(rows: Sequence[KindRow]) -> list[str]:
    lines = [
        "",
        "## By kind of case",
        "",
        "| level | group | kind | arm | metric | n | baseline | arm |",
        "|" + " --- |" * 8,
    ]
    return lines + [
        f"| {row.level} | {row.group} | {row.kind} | {row.arm} | {row.metric} | {row.n} "
        f"| {row.baseline:.3f} | {row.value:.3f} |"
        for row in rows
    ]


def _difference_table(rows: Sequence[Difference]) -> list[str]:
    lines = [
        "",
        "## All differences",
        "",
        "| level | group | cases | arm | metric | better | n | baseline | arm | difference | "
        "95 % interval | p | win/tie/loss | resolvable |",
        "|" + " --- |" * 14,
    ]
    for row in rows:
        better = {True: "higher", False: "lower", None: "neither"}[row.higher_is_better]
        lines.append(
            f"| {row.level} | {row.group} | {row.difficulty} | {row.arm} | {row.metric} | {better} | {row.n} "
            f"| {row.baseline:.3f} | {row.value:.3f} | {row.difference:+.3f} | {row.ci_low:+.3f} to "
            f"{row.ci_high:+.3f} | {row.p_value:.3f} | {row.wins}/{row.ties}/{row.losses} | "
            f"{row.resolvable:.3f} |"
        )
    return lines
