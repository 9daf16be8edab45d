"""The experiment's rows are paired over cases, with seeds averaged within a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "experiment"


@pytest.fixture(autouse=True)
def _recipe_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE)


def record(arm: str, case: str, value: float, seed: int = 0, difficulty: str = "hard") -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "group": "ocr", "difficulty": difficulty, "case": case,
        "metrics": {"letters": value},
    }  # fmt: skip


def test_rows_pair_cases_and_average_seeds_within_them() -> None:
    from results import rows_of, table

    records = [
        record("baseline", "a", 0.5), record("baseline", "b", 1.0, difficulty="easy"),
        record("baseline", "unpaired", 0.0),
        *(record("perceive", "a", value, seed) for seed, value in enumerate((1.0, 0.8, 0.6))),
        record("perceive", "b", 1.0, difficulty="easy"), record("shuffled", "a", 0.4),
    ]  # fmt: skip
    rows = {(row["arm"], row["difficulty"]): row for row in rows_of(records, "perception")}
    hard = rows["perceive", "hard"]
    assert (hard["n"], hard["seeds"], hard["against"]) == (1, [0, 1, 2], "baseline")
    assert hard["diff"] == pytest.approx(0.3)
    both = rows["perceive", "all"]
    assert (both["n"], both["baseline"]) == (2, 0.75)
    assert both["diff"] == pytest.approx(0.15)
    assert both["ci_low"] <= both["diff"] <= both["ci_high"]
    (against,) = (
        row for row in rows_of(records, "perception", "shuffled")
        if row["arm"] == "perceive" and row["difficulty"] == "all"
    )  # fmt: skip
    assert against["diff"] == pytest.approx(0.4)
    assert "| perception | ocr | hard | perceive | letters | 1 | 3 | 0.500 | 0.800 |" in table([hard])


def test_level_shares_are_means_over_the_edits_of_an_arm() -> None:
    from results import level_shares

    weights = [{"early": 0.2, "late": 0.8}, {"early": 0.6, "late": 0.4}]
    records = [{**record("perceive", "a", 1.0), "level_weights": one} for one in (*weights, None)]
    assert level_shares(records) == [
        {"arm": "perceive", "group": "ocr", "n": 2, "early": pytest.approx(0.4), "late": pytest.approx(0.6)}
    ]


def test_every_arm_that_is_promised_is_there_and_designs_differ() -> None:
    from designs import ARMS, DESIGNS, EXTRA

    assert {arm.name for arm in ARMS} == {
        "fresh", "random", "calibrated", "perceive", "edit", "perceive+edit", "shuffled", "target-only",
        "lora",
    }  # fmt: skip
    assert len({str(design) for design in DESIGNS}) == len(DESIGNS) >= 6
    assert len(EXTRA) == len({design.name for design in EXTRA.values()})


def test_figures_are_drawn(tmp_path: Path) -> None:
    from results import draw_curve, draw_differences, rows_of

    records = [
        record(arm, case, value) for arm, value in (("baseline", 0.4), ("perceive", 0.7)) for case in "ab"
    ]
    draw_differences(rows_of(records, "perception"), tmp_path / "a.png", "perception", "letters")
    draw_curve([(0.0, 0.0, 0.0, 0.0), (1.0, 0.1, 0.05, 0.2)], tmp_path / "b.png", "strength")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("a.png", "b.png"))
