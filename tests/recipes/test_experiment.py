"""The experiment's rows pair cases and average seeds within them; its designs are arms of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import made_how

NAMES = {f"{name}.{seed}": (name, seed) for name in ("perceive", "shuffled") for seed in range(3)}


def record(arm: str, case: str, value: float, difficulty: str = "hard") -> dict[str, Any]:
    return {
        "arm": arm,
        "level": "perception",
        "group": "ocr",
        "difficulty": difficulty,
        "case_id": case,
        "metrics": {"letters": value},
    }


def test_rows_pair_cases_and_average_seeds_within_them() -> None:
    from recipes.experiment.results import rows_of, table

    records = [
        record("baseline", "a", 0.5),
        record("baseline", "b", 1.0, difficulty="easy"),
        record("baseline", "unpaired", 0.0),
        *(record(f"perceive.{seed}", "a", value) for seed, value in enumerate((1.0, 0.8, 0.6))),
        record("perceive.0", "b", 1.0, difficulty="easy"),
        record("shuffled.0", "a", 0.4),
    ]
    rows = {(row["arm"], row["difficulty"]): row for row in rows_of(records, NAMES)}
    hard = rows["perceive", "hard"]
    assert (hard["n"], hard["seeds"], hard["against"]) == (1, [0, 1, 2], "baseline")
    assert hard["diff"] == pytest.approx(0.3)
    both = rows["perceive", "all"]
    assert (both["n"], both["baseline"]) == (2, 0.75)
    assert both["diff"] == pytest.approx(0.15)
    assert both["ci_low"] is both["ci_high"] is None  # two cases are too few
    (against,) = (
        row
        for row in rows_of(records, NAMES, "shuffled")
        if row["arm"] == "perceive" and row["difficulty"] == "all"
    )
    assert against["diff"] == pytest.approx(0.4)
    assert "| perception | ocr | hard | perceive | letters | 1 | 3 | 0.500 | 0.800 |" in table([hard])
    assert "+0.300 n too small" in table([hard])


def test_seeds_that_agree_with_the_baseline_do_not_differ() -> None:
    """A third of three times 0.1 is not 0.1 in floating point."""
    from recipes.experiment.results import rows_of

    arms = ["baseline", *(f"perceive.{seed}" for seed in range(3))]
    records = [record(arm, case, 0.1) for arm in arms for case in "abcdefghij"]
    row = rows_of(records, NAMES)[0]
    assert (row["diff"], row["ci_low"], row["ci_high"]) == (0, 0, 0)


def test_level_shares_are_means_over_the_edits_of_an_arm() -> None:
    from recipes.experiment.results import level_shares

    weights = [{"early": 0.2, "late": 0.8}, {"early": 0.6, "late": 0.4}]
    records = [{**record("perceive.0", "a", 1.0), "level_weights": one} for one in (*weights, None)]
    assert level_shares(records, NAMES) == [
        {"arm": "perceive", "group": "ocr", "n": 2, "early": pytest.approx(0.4), "late": pytest.approx(0.6)}
    ]


def test_every_arm_that_is_promised_is_there_and_designs_differ() -> None:
    from recipes.experiment.designs import ARMS, DESIGNS, EXTRA

    assert {arm.name for arm in ARMS} == {
        "fresh",
        "random",
        "calibrated",
        "perceive",
        "edit",
        "perceive+edit",
        "shuffled",
        "target-only",
        "lora",
        "sharp",
    }
    assert len({str(design) for design in DESIGNS}) == len(DESIGNS) >= 6
    assert len(EXTRA) == len({design.name for design in EXTRA.values()})


def test_a_design_comes_behind_what_it_starts_from() -> None:
    from recipes.experiment.designs import EXTRA, with_starts

    names = [design.name for design in with_starts([EXTRA["perceive+edit"], EXTRA["rank-4"]])]
    assert names == ["calibrated", "perceive", "perceive+edit", "calibrated-rank-4", "rank-4"]
    assert all(design.start is None or design.start in EXTRA for design in EXTRA.values())


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    from recipes.experiment.results import draw_curve

    row = {"diff": 0.1, "ci_low": 0.05, "ci_high": 0.2}
    draw_curve([(1.0, row), (0.5, {**row, "diff": 0.15})], tmp_path / "curve.png", "strength")
    assert np.ptp(np.asarray(Image.open(tmp_path / "curve.png").convert("L"))) > 100
    assert {"command", "versions", "date"} == made_how(tmp_path / "curve.png").keys()


@pytest.mark.slow
def test_finished_designs_are_arms_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from recipes.experiment.bench import Bench
    from recipes.experiment.designs import EXTRA
    from recipes.experiment.run import Entry, Experiment

    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(tmp_path / "home"))
    arguments = Namespace(
        folder=tmp_path, seeds=[0], batch_arms=1, workers=0, edit_steps=2, groups=["space"], edit_designs=None
    )
    bench = Bench(tmp_path, samples=4, workers=0)
    experiment = Experiment(bench, Namespace(**vars(arguments), edit_seeds=1))
    entries = experiment.entries([EXTRA["fresh"], EXTRA["sharp"]])
    assert [(entry.design.name, entry.seed) for entry in entries] == [("fresh", 0), ("sharp", 0)]
    assert experiment.entries([EXTRA["fresh"]]) == [Entry(EXTRA["fresh"], 0)]  # it is there already
    records = {record["arm"]: record for record in experiment.edited(entries, "test", 1)}
    assert [record["error"] for record in records.values()] == [None] * 3
    metrics = {name: records[name]["metrics"] for name in records}
    assert metrics["baseline"] == metrics["fresh.tower.1.0"] != metrics["sharp.tower.1.0"]
    assert sum(records["fresh.tower.1.0"]["level_weights"].values()) == pytest.approx(1.0, abs=1e-5)
    rows = experiment.rows(list(records.values()), "test")
    assert {row["diff"] for row in rows if row["arm"] == "fresh"} == {0}
    asked = experiment.evaluated(entries, "test", ["space"], 1, edits=False)
    assert {record["level"] for record in asked} == {"perception"}
    assert bench.pipeline.family.editor.condition_area != bench.pipeline.family.image_size**2  # put back
