"""One self-contained HTML page of a run: it opens offline, and nothing in a prompt can run in it.

Jinja escapes every value, and the page's own policy allows no script or style but the two below, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...io import write_image, write_whole
from ..evaluate import Evaluation
from ..statistics import BASELINE
from .figures import evaluation_figures
from .tables import expectations, headline_rows, kind_rows, warning

EACH = 4  # worst and best cases shown of every group and arm: a page of 500 cases would weigh too much
THUMB = 256  # px: the longer side of an image in the page
STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:1rem}
body{color:#223;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:.85rem;margin:0;overflow-wrap:anywhere}
.caution{background:#fff3cd;border-left:4px solid #d90;padding:.6rem .8rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid #dde}
.plot{width:auto;margin:0 0 1.2rem;overflow-x:auto}
.plot img{width:auto;max-width:100%;min-width:34rem}
.filters{position:sticky;top:0;background:#fff;padding:.5rem 0;z-index:2}
.filters{display:flex;flex-wrap:wrap;gap:1rem}
select{font:inherit}article{border:1px solid #dde;border-radius:6px;padding:.8rem;margin:.8rem 0}
.prompt{margin:.2rem 0 .6rem;overflow-wrap:anywhere}.images,section{display:flex;flex-wrap:wrap;gap:.8rem}
figure{margin:0;width:160px}figure img{width:100%;display:block}
figcaption{font-size:.8rem;overflow-wrap:anywhere}
.map{image-rendering:pixelated}.slider{position:relative}
.over{position:absolute;inset:0;clip-path:inset(0 0 0 50%)}
input[type=range]{width:100%;margin:.2rem 0}[hidden]{display:none!important}
details{margin:1rem 0}summary{cursor:pointer;font-weight:600}
pre{background:#f5f6f8;padding:.8rem;overflow-x:auto;font-size:.8rem}
@media(max-width:480px){body{padding:.6rem}.images figure{width:148px}}
"""
SCRIPT = """
const pick = id => document.getElementById(id), cards = [...document.querySelectorAll('article')];
const shown = card => card.querySelector('section:not([hidden])');
function update() {
  const group = pick('group').value, arm = pick('arm').value, sign = pick('order').value === 'best' ? -1 : 1;
  let count = 0;
  for (const card of cards) {
    let has = false;
    for (const part of card.querySelectorAll('section')) {
      part.hidden = part.dataset.arm !== arm; has = has || !part.hidden;
    }
    card.hidden = !has || (group !== '' && card.dataset.group !== group); count += !card.hidden;
  }
  const gain = card => shown(card) ? Number(shown(card).dataset.gain) : 0;
  pick('cases').append(...[...cards].sort((a, b) => sign * (gain(a) - gain(b))));
  pick('count').textContent = count + ' shown';
}
for (const id of ['group', 'arm', 'order']) pick(id).addEventListener('change', update);
for (const range of document.querySelectorAll('input[type=range]')) range.addEventListener('input', () => {
  range.parentElement.querySelector('.over').style.clipPath = 'inset(0 0 0 ' + range.value + '%)';
});
update();
"""


def write_page(folder: str | Path, found: Evaluation) -> Path:
    """Write `report.html` and its figures as PNG into a run's folder; its images are read from there.

    Raises:
        OSError: an image of the run is not there any more.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = Path(folder)
    rows = headline_rows(found)
    figures = evaluation_figures(rows, expectations(found), found.records)
    for name, (_, figure) in figures.items():
        write_image(folder / name, figure)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    cases = _cases(folder, found.records)
    page = (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            title=found.provenance.get("family", "?"),
            caution=warning(found),
            rows=rows,
            expectations=expectations(found),
            cases=cases,
            kinds=kind_rows(found),
            changes=[row for row in found.rows if row.difficulty == "all"],
            figures=[(words, _embedded(figure, max(figure.size))) for words, figure in figures.values()],
            total=len({record["case_id"] for record in found.records if record["level"] == "edit"}),
            each=EACH,
            groups=sorted({case["group"] for case in cases}),
            arms=[arm["name"] for arm in found.arms if arm["name"] != BASELINE],
            left_out=found.left_out,
            provenance=json.dumps(found.provenance, indent=2, ensure_ascii=False),
            style=Markup(STYLE),
            script=Markup(SCRIPT),
            style_hash=_digest(STYLE),
            script_hash=_digest(SCRIPT),
        )
    )
    return write_whole(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def gain_of(baseline: dict[str, float], arm: dict[str, float]) -> float:
    """How much better an arm's image is: by the verdict, then by what is left untouched and by distance."""
    order = (("right", 10.0), ("exact_text", 5.0), ("unedited_ssim", 1.0), ("target_difference", -1 / 255))
    return sum(
        weight * (arm[name] - baseline[name]) for name, weight in order if name in arm and name in baseline
    )


def _cases(folder: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst and best cases of every group and arm, with their images."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["level"] == "edit" and record["error"] is None:
            by_case.setdefault(record["case_id"], {})[record["arm"]] = record
    ranked: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case_id, arms in by_case.items():
        for name, record in arms.items():
            if name != BASELINE and BASELINE in arms:
                gain = gain_of(arms[BASELINE]["metrics"], record["metrics"])
                ranked.setdefault((record["group"], name), []).append((gain, case_id))
    chosen = set()
    for pairs in ranked.values():
        pairs.sort()
        chosen |= {case_id for _, case_id in (*pairs[:EACH], *pairs[-EACH:])}
    return [_card(folder, by_case[case_id]) for case_id in sorted(chosen)]


def _card(folder: Path, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
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


def _arm(folder: Path, baseline: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    right = {1.0: "right", 0.0: "wrong"}.get(record["metrics"].get("right"), "not judged")
    drawn = record.get("attention")
    return {
        "name": record["arm"],
        "image": _image(folder / record["image"]),
        "words": right,
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
