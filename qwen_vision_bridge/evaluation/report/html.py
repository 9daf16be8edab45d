"""One self-contained HTML page of a run: it opens offline, and nothing in a prompt can run in it.

Jinja escapes every value, and the page's own policy allows no script or style but the two below, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...io import write_image, write_text
from ..evaluate import Evaluation
from ..statistics import BASELINE, by_case
from .figures import evaluation_figures
from .tables import expectations, headline_rows, kind_rows, render_template, warning

EACH = 4  # worst and best cases shown of every group and arm: a page of 500 cases would weigh too much
THUMB = 256  # px: the longer side of an image in the page


def write_page(folder: str | Path, evaluation: Evaluation) -> Path:
    """Write `report.html` and its figures as PNG into a run's folder; its images are read from there.

    Raises:
        OSError: an image of the run is not there any more.
    """
    from markupsafe import Markup

    folder = Path(folder)
    rows = headline_rows(evaluation)
    figures = evaluation_figures(rows, expectations(evaluation), evaluation.records)
    for name, (_, figure) in figures.items():
        write_image(folder / name, figure)
    cases = _cases(folder, evaluation.records)
    here = Path(__file__).parent
    style, script = ((here / f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    page = render_template(
        "report.html.jinja",
        title=evaluation.provenance.get("family", "?"),
        caution=warning(evaluation),
        rows=rows,
        expectations=expectations(evaluation),
        cases=cases,
        kinds=kind_rows(evaluation),
        changes=[row for row in evaluation.rows if row.difficulty == "all"],
        figures=[(words, _embedded(figure, max(figure.size))) for words, figure in figures.values()],
        total=len({record["case_id"] for record in evaluation.records if record["level"] == "edit"}),
        each=EACH,
        groups=sorted({case["group"] for case in cases}),
        arms=[arm["name"] for arm in evaluation.arms if arm["name"] != BASELINE],
        left_out=evaluation.left_out,
        provenance=json.dumps(evaluation.provenance, indent=2, ensure_ascii=False),
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )
    return write_text(folder / "report.html", page)


def gain_of(baseline: dict[str, float], arm: dict[str, float]) -> float:
    """How much better an arm's image is: by the verdict, then by what is left untouched and by distance."""
    order = (("right", 10.0), ("exact_text", 5.0), ("unedited_ssim", 1.0), ("target_difference", -1 / 255))
    return sum(
        weight * (arm[name] - baseline[name]) for name, weight in order if name in arm and name in baseline
    )


def _cases(folder: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst and best cases of every group and arm, with their images."""
    edits = [record for record in records if record["level"] == "edit" and record["error"] is None]
    cases = by_case(edits).get((), {})
    ranked: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case_id, arms in cases.items():
        for name, record in arms.items():
            if name != BASELINE and BASELINE in arms:
                gain = gain_of(arms[BASELINE]["metrics"], record["metrics"])
                ranked.setdefault((record["group"], name), []).append((gain, case_id))
    best_and_worst = [pair for pairs in map(sorted, ranked.values()) for pair in pairs[:EACH] + pairs[-EACH:]]
    return [_card(folder, cases[case_id]) for case_id in sorted({case_id for _, case_id in best_and_worst})]


def _card(folder: Path, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    first = arms[BASELINE]
    stem = folder / first["group"] / first["case_id"]
    target = Path(f"{stem}_target.png")
    return {
        "case_id": first["case_id"],
        "group": first["group"],
        "prompt": first["prompt"],
        "input": _image(Path(f"{stem}_input.png")),
        "target": _image(target) if target.is_file() else "",
        "baseline": _image(folder / first["image"]),
        "read": [first.get("read_before"), first.get("read_after")],
        "arms": [_arm(folder, first, record) for name, record in arms.items() if name != BASELINE],
    }


def _arm(folder: Path, baseline: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    drawn = record.get("attention")
    return {
        "name": record["arm"],
        "image": _image(folder / record["image"]),
        "words": {1.0: "right", 0.0: "wrong"}.get(record["metrics"].get("right"), "not judged"),
        "read": record.get("read_after"),
        "gain": round(gain_of(baseline["metrics"], record["metrics"]), 6),
        "attention": _image(folder / drawn) if drawn else "",
    }


def _image(path: Path) -> str:
    with Image.open(path) as opened:
        return _embedded(opened.convert("RGB"), THUMB)


def _embedded(image: Image.Image, longest: int) -> str:
    """An image as a data address: WebP, without loss where it is tiny."""
    shown = image.copy()
    shown.thumbnail((longest, longest))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=85, lossless=max(shown.size) <= 64)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
