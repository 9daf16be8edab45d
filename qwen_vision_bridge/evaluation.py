"""Arms × cases → records → statistics: the same edits without and with the bridge, measured and paired.

Each record is on disk as soon as its picture is, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from . import metrics
from .images import image_digest
from .judging import judge
from .pipeline import EnhancedQwenImageEdit
from .records import digest_of, write_json, write_picture, write_whole
from .world import GROUPS, Case

logger = logging.getLogger(__name__)

ARMS = ("baseline", "enhanced")
RESAMPLES = 10_000
FEW = 30  # below this many cases a bootstrap interval is too narrow to be believed
HIGHER_IS_BETTER = {
    "right": True,
    "exact_text": True,
    "edit_similarity": True,
    "objects_lost": False,
    "centroid_error_px": False,
    "unedited_ssim": True,
    "unedited_psnr_db": True,
    "target_difference": False,
}
TITLES = {
    "ocr": "OCR capability",
    "space": "Spatial reasoning",
    "detail": "Detail preservation",
    "consistency": "Consistency between pictures",
}
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
    "consistency": (),  # takes several pictures
}


class Summary(NamedTuple):
    """One metric of one group: the paired difference of the enhanced arm over the baseline."""

    group: str
    metric: str
    higher_is_better: bool
    n: int
    baseline: float
    enhanced: float
    difference: float
    ci_low: float
    """Lower end of the 95 % percentile bootstrap interval of the mean paired difference."""
    ci_high: float


def evaluate(
    pipeline: EnhancedQwenImageEdit,
    cases: Sequence[Case],
    folder: str | Path,
    seed: int = 0,
    strength: float = 1.0,
    **options: Any,
) -> list[Summary]:
    """Edit every case in both arms, measure, and write pictures, records and statistics into a folder.

    Writes `results.jsonl` (one record a picture, as they come), `results.json`, `results.csv`, `summary.md`
    and the pictures. Records that are there from an earlier run with the same models and settings are kept.

    Returns:
        One summary a group and metric.
    """
    from tqdm import tqdm

    folder = Path(folder)
    log = folder / "results.jsonl"
    done = _read_log(log)
    records = []
    for case in tqdm(cases, desc="cases", unit="case"):
        for arm in ARMS:
            key = _key(pipeline, case, arm, seed, strength, options)
            if key not in done:
                done[key] = {
                    "key": key,
                    **_run_case(pipeline, case, arm, folder, key, seed, strength, options),
                }
                _append(log, done[key])
            records.append(done[key])
    summaries = summarise(records, seed)
    write_report(folder, pipeline.provenance([seed]), summaries, records)
    return summaries


def measure(case: Case, picture: Image.Image) -> dict[str, float]:
    """Every metric of a case's group for one edited picture; `right` is the judge's verdict as 1.0 or 0.0."""
    if picture.size != case.target.size:
        raise ValueError(f"the edit is {picture.size} px, the case {case.case_id} is {case.target.size} px")
    read = metrics.read_text(picture) if case.group == "ocr" else None  # the slowest part: once a picture
    unedited = metrics.shrink(~case.edit_mask)
    values = {
        "right": float(judge(case, picture, read).right),
        "unedited_ssim": metrics.masked_ssim(picture, case.image, unedited),
        "unedited_psnr_db": min(metrics.masked_psnr(picture, case.image, unedited), 100.0),
        "target_difference": metrics.mean_abs_difference(picture, case.target),
    }
    if read is not None:
        values["exact_text"] = metrics.exact_text(read, case.expected_text or "")
        values["edit_similarity"] = metrics.edit_similarity(read, case.expected_text or "")
    if case.group == "space":
        values["centroid_error_px"] = metrics.centroid_error(picture, case.expected_objects)
        values["objects_lost"] = metrics.objects_lost(picture, case.expected_objects)
    return values


def summarise(records: Sequence[dict[str, Any]], seed: int = 0) -> list[Summary]:
    """Paired differences by group and metric, over the cases for which both arms have the metric."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        by_case.setdefault(record["case_id"], {})[record["arm"]] = record
    pairs = [arms for arms in by_case.values() if set(arms) == set(ARMS)]
    summaries = []
    for group in GROUPS:
        members = [arms for arms in pairs if arms["baseline"]["group"] == group]
        for name in HIGHER_IS_BETTER:
            values = [
                (arms["baseline"]["metrics"].get(name), arms["enhanced"]["metrics"].get(name))
                for arms in members
            ]
            both = np.array([pair for pair in values if None not in pair], dtype=float)  # (n, 2)
            if len(both):
                summaries.append(_summary(group, name, both, seed))
    return summaries


def bootstrap_interval(
    differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13), seeded.

    Args:
        differences: (n,) paired differences.

    Raises:
        ValueError: no differences.
    """
    if len(differences) == 0:
        raise ValueError("an interval needs at least one paired difference")
    picks = np.random.default_rng(seed).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.percentile(differences[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def write_report(
    folder: Path, provenance: dict[str, Any], summaries: Sequence[Summary], records: Sequence[dict[str, Any]]
) -> None:
    """Write `results.json`, `results.csv` and `summary.md`."""
    data = {
        "provenance": provenance,
        "summary": [row._asdict() for row in summaries],
        "records": list(records),
    }
    write_json(folder / "results.json", data)
    write_whole(folder / "results.csv", lambda path: path.write_text(_as_csv(records), encoding="utf-8"))
    write_whole(
        folder / "summary.md",
        lambda path: path.write_text(_as_markdown(provenance, summaries), encoding="utf-8"),
    )


def caution(summaries: Sequence[Summary]) -> str:
    """What the sample cannot carry, in one line; empty where it is large enough."""
    fewest = min((row.n for row in summaries), default=0)
    if fewest >= FEW:
        return ""
    return f"Only {fewest} cases a group: this shows that everything runs, and says nothing about a gain."


def as_table(summaries: Sequence[Summary]) -> str:
    """The summaries as a plain table, with a word of caution where there are few cases."""
    lines = [
        f"{'group':11} {'metric':19} {'n':>4} {'baseline':>9} {'enhanced':>9} {'difference':>10} "
        "95 % interval"
    ]
    for row in summaries:
        arrow = "↑" if row.higher_is_better else "↓"
        lines.append(
            f"{row.group:11} {row.metric + ' ' + arrow:19} {row.n:4d} {row.baseline:9.3f} "
            f"{row.enhanced:9.3f} {row.difference:+10.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        )
    return "\n".join([*lines, *filter(None, [caution(summaries)])])


def _run_case(
    pipeline: EnhancedQwenImageEdit, case: Case, arm: str, folder: Path, key: str, seed: int, strength: float,
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    started = time.perf_counter()
    enhanced = arm == "enhanced"
    pictures = case.pictures if case.references else case.image  # the first edit pipeline takes one only
    picture = pipeline.generate(pictures, case.prompt, enhanced, strength, seed, **options)
    seconds = time.perf_counter() - started
    if picture.size != case.target.size:  # the editor works at its own size; cases may be of another
        picture = picture.resize(case.target.size)
    edited = f"{arm}-{key[:6]}"  # another bridge's picture of the same case keeps its own name
    references = [(f"reference{number}", shown) for number, shown in enumerate(case.references, start=1)]
    for name, shown in (*references, ("input", case.image), ("target", case.target), (edited, picture)):
        write_picture(folder / case.group / f"{case.case_id}_{name}.png", shown)
    return {
        "case_id": case.case_id,
        "group": case.group,
        "kind": case.kind,
        "difficulty": case.difficulty,
        "arm": arm,
        "prompt": case.prompt,
        "seconds": round(seconds, 3),
        "picture": f"{case.group}/{case.case_id}_{edited}.png",
        "metrics": measure(case, picture),
    }


def _key(
    pipeline: EnhancedQwenImageEdit, case: Case, arm: str, seed: int, strength: float, options: dict[str, Any]
) -> str:
    enhanced = arm == "enhanced"
    pictures = [image_digest(shown) for shown in case.pictures]
    made = [pipeline.made_from(enhanced), case.case_id, case.prompt, pictures, arm, seed]
    return digest_of([*made, strength if enhanced else None, sorted(options.items())])


def _summary(group: str, metric: str, both: np.ndarray, seed: int) -> Summary:
    differences = both[:, 1] - both[:, 0]
    low, high = bootstrap_interval(differences, seed)
    means = both.mean(axis=0)
    return Summary(
        group, metric, HIGHER_IS_BETTER[metric], len(both),
        float(means[0]), float(means[1]), float(differences.mean()), low, high,
    )  # fmt: skip


def _read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Records of an earlier run by key; a last line cut short by a kill is dropped, with a word."""
    if not path.is_file():
        return {}
    records = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s, line %d is cut short: that case runs again", path, number)
            continue
        records[record["key"]] = record
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(max(file.tell() - 1, 0))
        whole = file.read(1) in ("", "\n")
        file.write(("" if whole else "\n") + json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _as_csv(records: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    plain = ["case_id", "group", "kind", "difficulty", "arm", "prompt", "seconds", "picture"]
    writer = csv.DictWriter(buffer, [*plain, *HIGHER_IS_BETTER])
    writer.writeheader()
    for record in records:
        writer.writerow({**{name: record[name] for name in plain}, **record["metrics"]})
    return buffer.getvalue()


def _as_markdown(provenance: dict[str, Any], summaries: Sequence[Summary]) -> str:
    lines = [
        "# Evaluation",
        "",
        "| group | metric | better | n | baseline | enhanced | difference | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summaries:
        better = "higher" if row.higher_is_better else "lower"
        lines.append(
            f"| {row.group} | {row.metric} | {better} | {row.n} | {row.baseline:.3f} | {row.enhanced:.3f} | "
            f"{row.difference:+.3f} | {row.ci_low:+.3f} to {row.ci_high:+.3f} |"
        )
    lines += [
        "",
        "Paired differences, percentile bootstrap over cases. An interval that holds 0 shows no difference.",
    ]
    lines += ["", "```json", json.dumps(provenance, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)
