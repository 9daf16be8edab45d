"""The page of a run: loads without a complaint in a real browser, filters and slides, and runs no prompt."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.evaluation.evaluate import Evaluation
from qwen_vision_bridge.evaluation.metrics.registry import METRICS
from qwen_vision_bridge.evaluation.report.figures import SPREAD, case_differences, evaluation_figures
from qwen_vision_bridge.evaluation.report.html import EACH, write_page
from qwen_vision_bridge.evaluation.report.tables import write_results
from qwen_vision_bridge.evaluation.statistics import compare_arms

FIGURES = ("differences", "wins", "expectations", "cases")
CHROMIUM = shutil.which("chromium")
EVIL = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </style> {{ 7*7 }}"
)
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


def record(folder: Path, case: int, arm: str, group: str) -> dict[str, Any]:
    rng = np.random.default_rng([case, len(arm)])
    for name in (f"{group}/c{case}_{arm}", f"{group}/c{case}_{arm}_levels", f"{group}/c{case}_input"):
        (folder / group).mkdir(exist_ok=True)
        size = 8 if name.endswith("levels") else 96
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return {
        "key": f"{case}{arm}",
        "level": "edit",
        "case_id": f"c{case}",
        "group": group,
        "kind": "k",
        "difficulty": "easy",
        "arm": arm,
        "prompt": EVIL,
        "seed": 0,
        "error": None,
        "seconds": 1.0,
        "image": f"{group}/c{case}_{arm}.png",
        "metrics": {"right": float(rng.random() < 0.5), SPREAD[group]: float(rng.random())},
        **({"attention": f"{group}/c{case}_{arm}_levels.png"} if arm != "baseline" else {}),
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    records = [
        record(folder, case, arm, ("ocr", "space")[case % 2])
        for case in range(24)
        for arm in ("baseline", "bridge", "shuffled")
    ]
    rows = compare_arms(records, METRICS, ("ocr", "space"))
    arms = [
        {"name": "baseline"},
        {"name": "bridge", "features": "own"},
        {"name": "shuffled", "features": "x"},
    ]
    found = Evaluation(rows, records, [EVIL], {"family": "miniature", "command": EVIL}, arms, 1.0, 0)
    write_results(folder, found)
    write_page(folder, found)
    return folder


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert not re.findall(r"CONSOLE.*", done.stderr), done.stderr
    return done


def test_the_page_is_one_file_and_escapes_every_prompt(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "<script>document" not in text
    assert text.count("<script") == 1
    assert "{{ 7*7 }}" in text
    assert "script-src 'sha256-" in text
    assert f"{EACH} worst and the {EACH} best" in text
    assert "=cmd" not in (run_folder / "results.csv").read_text(encoding="utf-8")


def test_every_figure_of_the_page_lies_beside_it_as_png(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    made = {path.name for path in run_folder.glob("*.png")}
    assert {f"{name}.png" for name in FIGURES} <= made
    for words in (
        "Paired differences",
        "Cases won, tied and lost",
        "Differences case by case",
        "Measured gains",
    ):
        assert f"<figcaption>{words}" in text
    shown = re.findall(r'<figure class="plot"><img alt="[^"]*" src="data:image/webp;base64,([^"]+)"', text)
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data in shown}
    assert sizes == {Image.open(run_folder / f"{name}.png").size for name in FIGURES}  # none is made smaller


def test_differences_case_by_case_are_those_of_the_records() -> None:
    records = [
        {"level": "edit", "group": "ocr", "case_id": case, "arm": arm, "metrics": {"edit_similarity": value}}
        for case, arm, value in (
            ("b", "baseline", 0.5),
            ("a", "baseline", 0.25),
            ("a", "bridge", 1.0),
            ("b", "bridge", 0.0),
            ("c", "bridge", 1.0),
        )
    ]
    records.append({**records[2], "level": "perception", "case_id": "b"})
    spread = case_differences(records)
    assert {group: list(arms) for group, arms in spread.items()} == {"ocr": ["bridge"]}
    assert spread["ocr"]["bridge"].tolist() == [0.75, -0.5]
    assert case_differences([]) == evaluation_figures([], [], []) == {}


@BROWSER
def test_the_page_loads_without_a_complaint_and_no_prompt_runs(run_folder: Path) -> None:
    dom = browse(run_folder / "report.html", "--dump-dom").stdout
    assert "<title>Evaluation: miniature</title>" in dom
    shown = re.search(r'<output id="count">(\d+) shown', dom)
    assert shown is not None, "the page's own script did not run"
    assert int(shown[1]) == dom.count("<article")


@BROWSER
def test_filters_and_sliders_work(run_folder: Path) -> None:
    """A copy of the page without its policy is driven from inside, as a reader would."""
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    drive = """<script>
    const pick2 = (id, value) => { const box = document.getElementById(id); box.value = value;
      box.dispatchEvent(new Event('change')); };
    pick2('group', 'space'); pick2('arm', 'shuffled'); pick2('order', 'best');
    const open = [...document.querySelectorAll('article:not([hidden])')];
    const range = open[0].querySelector('section:not([hidden]) input'); range.value = 10;
    range.dispatchEvent(new Event('input'));
    const gains = open.map(card => Number(card.querySelector('section:not([hidden])').dataset.gain));
    document.title = [open.every(card => card.dataset.group === 'space'),
      document.querySelectorAll('section[data-arm=bridge]:not([hidden])').length,
      gains.every((gain, i) => i === 0 || gains[i - 1] >= gain),
      range.parentElement.querySelector('.over').style.clipPath].join(' ');
    </script></body>"""
    copy = run_folder / "driven.html"
    copy.write_text(text.replace("</body>", drive), encoding="utf-8")
    dom = browse(copy, "--dump-dom").stdout
    assert "<title>true 0 true inset(0px 0px 0px 10%)</title>" in dom, dom[:3000]


@BROWSER
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_phone_and_desktop(width: int, run_folder: Path) -> None:
    """In a frame of that width, since a headless window cannot be as narrow as a phone."""
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    told = "<script>parent.document.title = document.documentElement.scrollWidth</script></body>"
    (run_folder / "inner.html").write_text(text.replace("</body>", told), encoding="utf-8")
    outer = run_folder / "outer.html"
    outer.write_text(f'<iframe src="inner.html" width="{width}" height="900" frameborder="0"></iframe>')
    dom = browse(
        outer,
        "--dump-dom",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
        f"--screenshot={run_folder}/page-{width}.png",
        f"--window-size={max(width, 500)},1000",
    ).stdout
    found = re.search(r"<title>(\d+)</title>", dom)
    assert found is not None
    assert int(found[1]) <= width
