"""The page of a run: loads without a complaint in a real browser, filters and slides, and runs no prompt."""

from __future__ import annotations

import base64
import io
import json
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
from qwen_vision_bridge.evaluation.report.answer import answers_of
from qwen_vision_bridge.evaluation.report.cards import EACH, telling_cases
from qwen_vision_bridge.evaluation.report.figures import SPREAD, case_differences, evaluation_figures
from qwen_vision_bridge.evaluation.report.html import write_page
from qwen_vision_bridge.evaluation.report.overview import MOST, evenly, write_overview
from qwen_vision_bridge.evaluation.report.tables import OUTSIDE, as_table, headline_rows, write_results
from qwen_vision_bridge.evaluation.statistics import by_case, compare_arms
from tests.conftest import made_how

FIGURES = ("differences", "wins", "expectations", "gains_by_case")
CHROMIUM = shutil.which("chromium")
EVIL = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </style> {{ 7*7 }}"
)
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


ARMS = [{"name": "baseline"}, {"name": "bridge", "features": "own"}, {"name": "shuffled", "features": "x"}]


def record(folder: Path, case: int, arm: str, group: str, **metrics: float) -> dict[str, Any]:
    rng = np.random.default_rng([case, len(arm)])
    names = (f"c{case}_{arm}", f"c{case}_{arm}_levels", f"c{case}_input", f"c{case}_reference1")
    for name in (f"{group}/{name}" for name in names):
        (folder / group).mkdir(exist_ok=True)
        size = 8 if name.endswith("levels") else 96
        image = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
        image.save(folder / f"{name}.png", compress_level=0)
    shares = {"early": 0.5, "mid": 0.3, "late": 0.2}
    levels = {"attention": f"{group}/c{case}_{arm}_levels.png", "level_weights": shares}
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
        "metrics": metrics or {"right": float(rng.random() < 0.5), SPREAD[group]: float(rng.random())},
        **(levels if arm != "baseline" else {}),
    }


def evaluation(records: list[dict[str, Any]], family: str = "qwen") -> Evaluation:
    rows = compare_arms(records, METRICS, ("ocr", "space", "other"))
    return Evaluation(rows, records, [EVIL], {"family": family, "command": EVIL}, ARMS, 1.0, 0)


def judged(folder: Path, *pairs: tuple[float, float], metric: str = "right") -> list[dict[str, Any]]:
    """Records of cases with these values of a metric in the baseline and with the bridge."""
    return [
        record(folder, case, arm, "ocr", **{metric: value})
        for case, pair in enumerate(pairs)
        for arm, value in zip(("baseline", "bridge"), pair, strict=True)
    ]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    records = [
        record(folder, case, arm, ("ocr", "space")[case % 2])
        for case in range(24)
        for arm in ("baseline", "bridge", "shuffled")
    ]
    found = evaluation(records, "miniature")
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
    assert "@import" not in text
    assert "url(" not in text
    assert "=cmd" not in (run_folder / "results.csv").read_text(encoding="utf-8")


def test_every_figure_of_the_page_lies_beside_it_as_png(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    made = {path.name for path in run_folder.glob("*.png")}
    assert {made_how(run_folder / name)["family"] for name in made} == {"miniature"}
    assert {f"{name}.png" for name in FIGURES} <= made
    for words in (
        "Paired differences",
        "Cases won, tied and lost",
        "Differences case by case",
        "Measured gains",
    ):
        assert f"<figcaption>{words}" in text
    plot = r'<figure class="plot"><figcaption>[^<]*</figcaption><img alt="[^"]*" src="data:image/webp;base64,'
    shown = re.findall(rf'{plot}([^"]+)"', text)
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data in shown}
    assert sizes == {Image.open(run_folder / f"{name}.png").size for name in FIGURES}  # none is made smaller


def test_differences_case_by_case_are_those_of_the_records() -> None:
    values = [(case, arm) for case in range(10) for arm in ("baseline", "bridge")]
    records = [
        {
            "level": "edit",
            "group": "ocr",
            "case_id": f"c{9 - case}",
            "arm": arm,
            "metrics": {"edit_similarity": 0.5 if arm == "baseline" else case / 10},
        }
        for case, arm in values
    ]
    records += [{**records[1], "level": "perception"}, {**records[1], "case_id": "without a baseline"}]
    spread = case_differences(records)
    assert {group: list(arms) for group, arms in spread.items()} == {"ocr": ["bridge"]}
    assert spread["ocr"]["bridge"] == pytest.approx([case / 10 - 0.5 for case in range(9, -1, -1)])
    assert case_differences(records[2:]) == {}  # nine cases are no distribution
    assert case_differences([{**one, "metrics": {"edit_similarity": 1.0}} for one in records]) == {}
    assert case_differences([]) == evaluation_figures([], [], []) == {}


def test_figures_that_would_say_nothing_are_not_drawn(tmp_path: Path) -> None:
    few = evaluation(judged(tmp_path, (0, 1), (1, 1), (1, 1)))
    assert set(evaluation_figures(few.rows, [], few.records)) == {"wins.png"}
    same = evaluation(judged(tmp_path, *[(0, 0), (1, 1)] * 6))
    assert evaluation_figures(same.rows, [], same.records) == {}
    (tmp_path / "gains_by_case.png").touch()  # of an earlier, larger run
    write_page(tmp_path, few)
    assert {path.name for path in tmp_path.glob("*.png")} == {"wins.png"}


WON, LOST, BOTH, NEITHER = (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("pairs", "verdict", "numbers"),
    [
        ([WON] * 20 + [BOTH] * 20, "yes", ["100 % of 40", "baseline 50 %", "+50.0 points", "n = 40"]),
        ([LOST] * 20 + [BOTH] * 20, "no", ["50 % of 40", "baseline 100 %", "-50.0 points", "n = 40"]),
        ([WON] * 2 + [LOST] * 2 + [BOTH] * 36, "open", ["95 % of 40", "+0.0 points", "includes 0"]),
        ([WON, BOTH, BOTH], "open", ["3 cases are too few", "3 of 3", "2 of 3"]),
        ([WON] * 12, "open", ["fewer than 30 cases"]),
        ([NEITHER] * 40, "open", ["0 % of 40", "no case differs"]),
    ],
)
def test_the_first_sentence_answers_with_its_numbers(
    pairs: list[tuple[float, float]], verdict: str, numbers: list[str], tmp_path: Path
) -> None:
    found = evaluation(judged(tmp_path, *pairs))
    (answer,) = answers_of(found)
    assert answer.verdict == verdict
    for number in numbers:
        assert number in answer.text
    assert answer.text in as_table(found)
    page = write_page(tmp_path, found).read_text(encoding="utf-8")
    assert page.index(answer.text) < page.index("<table") < page.index("<article")


def test_a_gain_that_a_control_has_too_is_said_so(tmp_path: Path) -> None:
    records = judged(tmp_path, *[WON] * 20, *[BOTH] * 20)
    twins = [{**one, "arm": "shuffled"} for one in records if one["arm"] == "bridge"]
    (answer,) = answers_of(evaluation(records + twins))
    assert "+0.0 points beyond shuffled (no case differs, not told apart)" in answer.beyond
    page = write_page(tmp_path, evaluation(twins + records)).read_text(encoding="utf-8")
    assert re.findall(r'<tr class="(\w+)"', page) == ["bridge", "control"]


def test_the_examples_are_one_of_each_outcome_first(tmp_path: Path) -> None:
    records = judged(tmp_path, BOTH, NEITHER, LOST, WON, WON, BOTH)
    assert telling_cases(by_case(records)[()], "bridge") == ["c3", "c0", "c2", "c1", "c4", "c5"]
    page = write_page(tmp_path, evaluation(records)).read_text(encoding="utf-8")
    headings = re.findall(r"<h3>([^<]*)</h3>", page)
    assert headings == [
        "The bridge is right, the baseline wrong",
        "Both are right",
        "The bridge is wrong, the baseline right",
    ]
    verdicts = re.findall(r'class="name">(\w+)</span> <b class="verdict \w+">(. \w+)</b>', page)
    assert verdicts[:4] == [
        ("baseline", "✗ wrong"),
        ("bridge", "✓ right"),
        ("baseline", "✓ right"),
        ("bridge", "✓ right"),
    ]
    assert page.count("<figcaption>reference 1<") == page.count("<article") == 6
    assert "early 50 %" in page
    assert "2 × the bridge is right, the baseline wrong" in page


def test_small_samples_show_no_interval_anywhere(tmp_path: Path) -> None:
    found = evaluation(judged(tmp_path, WON, BOTH, BOTH))
    write_results(tmp_path, found)
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["summary"]
    assert (row["ci_low"], row["ci_high"], row["difference"]) == (None, None, pytest.approx(1 / 3))
    for text in (
        as_table(found),
        (tmp_path / "summary.md").read_text(encoding="utf-8"),
        write_page(tmp_path, found).read_text(encoding="utf-8"),
    ):
        assert "n too small" in text
        assert "+0.000 to +1.000" not in text


def test_own_cases_are_judged_by_what_they_state(tmp_path: Path) -> None:
    """Text alone gives a verdict; a target, a mask and boxes give a row each."""
    texts = evaluation(judged(tmp_path, WON, BOTH, metric="exact_text"))
    assert [(row.metric, row.n, row.value) for row in headline_rows(texts)] == [("exact_text", 2, 1.0)]
    assert "exact_text" in as_table(texts)
    page = write_page(tmp_path, texts).read_text(encoding="utf-8")
    assert "✗ wrong" in page
    assert "text ✗ not as stated" in page
    assert "Nothing is known" not in page + as_table(texts)
    stated = [
        record(tmp_path, 0, arm, "other", exact_text=1.0, target_difference=off, box_iou=0.5)
        for arm, off in (("baseline", 4.0), ("bridge", 3.0))
    ]
    both = evaluation(stated)
    assert [row.metric for row in headline_rows(both)] == ["exact_text", "box_iou", "target_difference"]
    page = write_page(tmp_path, both).read_text(encoding="utf-8")
    assert "✓ right</b>" not in page
    assert "3.0 of 255 off the target" in page
    targets = judged(tmp_path, *[(4.0 + case % 3, 3.0) for case in range(30)], metric="target_difference")
    assert answers_of(evaluation(targets))[0].verdict == "yes"  # nearer to the target is better
    kept = answers_of(evaluation(judged(tmp_path, *[WON] * 30, metric="unedited_ssim")))[0]
    assert kept.verdict == "open"  # what stays says nothing about what was asked
    blind = evaluation(judged(tmp_path, (1.0, 2.0), metric="change_from_input"))
    assert headline_rows(blind) == []
    assert "Nothing is known" in as_table(blind)
    assert "Nothing is known" in write_page(tmp_path, blind).read_text(encoding="utf-8")


def test_the_miniature_on_photographs_says_what_it_knows(tmp_path: Path) -> None:
    records = judged(tmp_path, (1.0, 2.0), metric="change_from_input")
    synthetic = [{**one, "kind": "change_text"} for one in records]
    for family, some, says in (
        ("miniature", records, True),
        ("miniature", synthetic, False),
        ("qwen", records, False),
    ):
        found = evaluation(some, family)
        page = write_page(tmp_path, found).read_text(encoding="utf-8")
        assert (OUTSIDE in as_table(found)) == (OUTSIDE in page) == says


@pytest.mark.slow
def test_the_overview_shows_every_arm_of_up_to_24_cases(tmp_path: Path) -> None:
    few = evaluation(judged(tmp_path, WON, BOTH))
    path = write_overview(tmp_path, few)
    assert path == tmp_path / "overview.png"
    assert made_how(path)["family"] == "qwen"
    small = Image.open(path).size
    write_overview(tmp_path, evaluation(judged(tmp_path, *[WON] * 40)))
    large = Image.open(tmp_path / "overview.png").size
    assert large[0] == pytest.approx(2 * small[0], rel=0.1)  # two cases abreast
    assert large[1] / small[1] == pytest.approx(MOST / 2 / 2, rel=0.3)
    assert evenly(range(5)) == [0, 1, 2, 3, 4]
    chosen = evenly(range(100))
    assert (len(chosen), chosen[0], chosen[-1]) == (MOST, 0, 99)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    assert write_overview(tmp_path, evaluation([])) is None


@BROWSER
def test_the_page_loads_without_a_complaint_and_no_prompt_runs(run_folder: Path) -> None:
    dom = browse(run_folder / "report.html", "--dump-dom").stdout
    assert "<title>Does the bridge make edits better? Evaluation of miniature</title>" in dom
    shown = re.search(r'<output id="count">(\d+) shown', dom)
    assert shown is not None, "the page's own script did not run"
    assert int(shown[1]) + 3 == dom.count("<article")  # three examples stand before them
    sliders = dom.count('<div class="slider"')
    assert sliders == dom.count("<article") == dom.count('class="divider"') == dom.count('class="over"')


@BROWSER
def test_filters_and_sliders_work(run_folder: Path) -> None:
    """A copy of the page without its policy is driven from inside, as a reader would."""
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    drive = """<script>
    const pick2 = (id, value) => { const box = document.getElementById(id); box.value = value;
      box.dispatchEvent(new Event('change')); };
    pick2('group', 'space'); pick2('arm', 'shuffled'); pick2('order', 'best');
    const open = [...document.querySelectorAll('#cases article:not([hidden])')];
    const range = document.querySelector('.compare input'); range.value = 10;
    range.dispatchEvent(new Event('input'));
    const part = card => card.querySelector('.arm[data-arm=shuffled]');
    const gains = open.map(card => Number(part(card).dataset.gain));
    pick2('outcome', 'loss');
    const lost = [...document.querySelectorAll('#cases article:not([hidden])')];
    document.title = [open.length > 0, open.every(card => card.dataset.group === 'space'),
      gains.every((gain, i) => i === 0 || gains[i - 1] >= gain),
      lost.every(card => part(card).dataset.outcome === 'loss'),
      getComputedStyle(range.closest('.compare').querySelector('.over')).clipPath].join(' ');
    </script></body>"""
    copy = run_folder / "driven.html"
    copy.write_text(text.replace("</body>", drive), encoding="utf-8")
    dom = browse(copy, "--dump-dom").stdout
    assert "<title>true true true true inset(0px 0px 0px 10%)</title>" in dom, dom[:3000]


@pytest.mark.slow
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
