"""What is planted is found, what is not is not, and nothing depends on the order of cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vision_bridge.evaluation import statistics as comparisons
from qwen_vision_bridge.evaluation.metrics.registry import Metric
from qwen_vision_bridge.evaluation.statistics import bootstrap_interval, compare_arms

METRICS = {
    "right": Metric("right", (), None, True, is_share=True),
    "error_px": Metric("error_px", (), None, False),
}
GROUPS = ("ocr", "space")


def records(
    baseline: np.ndarray, arm: np.ndarray, metric: str = "right", group: str = "ocr"
) -> list[dict[str, Any]]:
    return [
        {
            "level": "edit",
            "case_id": f"{group}-{number:04d}",
            "group": group,
            "arm": name,
            "difficulty": ("easy", "hard")[number % 2],
            "metrics": {metric: float(value)},
        }
        for number, pair in enumerate(zip(baseline, arm, strict=True))
        for name, value in zip(("baseline", "bridge"), pair, strict=True)
    ]


def row_of(made: list[dict[str, Any]], difficulty: str = "all") -> comparisons.Difference:
    return next(row for row in compare_arms(made, METRICS, GROUPS) if row.difficulty == difficulty)


def verdict(row: comparisons.Difference) -> str:
    return comparisons.judge_expectations([row], {"edit": "right"}, ["bridge"])[0].verdict


def shares(share: float, count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def test_identical_arms_differ_by_exactly_zero_in_every_number() -> None:
    values = np.random.default_rng(0).random(41)
    row = row_of(records(values, values, "error_px"))
    assert (row.difference, row.ci_low, row.ci_high, row.p_value) == (0, 0, 0, 1)
    assert (row.wins, row.ties, row.losses) == (0, 41, 0)


def test_planted_gains_and_losses_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    before = rng.random(80)
    for shift, wins in ((0.1, "losses"), (-0.1, "wins")):  # of an error: lower is better
        row = row_of(records(before, before + shift + 0.05 * rng.normal(size=80), "error_px"))
        assert row.ci_low <= row.difference <= row.ci_high
        assert row.ci_low * row.ci_high > 0
        assert row.p_value < 0.001
        assert getattr(row, wins) > 60


@pytest.mark.slow
def test_null_experiments_raise_5_percent_false_alarms() -> None:
    alarms = {"interval": 0, "wilcoxon": 0, "sign": 0}
    for trial in range(200):
        rng = np.random.default_rng([7, trial])
        before, after = rng.random(60), rng.random(60)
        row = row_of(records(before, after, "error_px"))
        alarms["interval"] += row.ci_low > 0 or row.ci_high < 0
        alarms["wilcoxon"] += row.p_value < 0.05
        row = row_of(records(shares(0.5, 60, 2 * trial), shares(0.5, 60, 2 * trial + 1)))
        alarms["sign"] += row.p_value < 0.05
    # Two standard errors around 5 % of 200 are 4 to 16; the exact sign test is conservative.
    assert 4 <= alarms["interval"] <= 18, alarms
    assert 4 <= alarms["wilcoxon"] <= 16, alarms
    assert 1 <= alarms["sign"] <= 16, alarms


@given(st.permutations(range(24)))
@settings(max_examples=25, deadline=None)
def test_shuffling_the_cases_changes_no_bit(order: list[int]) -> None:
    rng = np.random.default_rng(3)
    made = records(rng.random(12), rng.random(12), "error_px")
    assert compare_arms([made[i] for i in order], METRICS, GROUPS) == compare_arms(made, METRICS, GROUPS)


def test_hand_computed_counts_means_and_tests() -> None:
    row = row_of(records(np.array([0, 0, 0, 1, 1, 0.0]), np.array([1, 1, 1, 1, 0, 0.0])))
    assert (row.n, row.wins, row.ties, row.losses) == (6, 3, 2, 1)
    assert row.difference == pytest.approx(2 / 6)
    assert row.test == "sign"
    assert row.p_value == pytest.approx(2 * (1 + 4) / 16)  # 3 or more of 4, both tails
    errors = row_of(records(np.array([5, 6, 7, 8, 9, 4.0]), np.array([4, 4, 4, 4, 4, 4.0]), "error_px"))
    assert (errors.test, errors.p_value) == ("wilcoxon", pytest.approx(2 / 2**5))  # all five go down
    assert errors.wins == 5


def test_easy_and_hard_cases_are_also_summed_up_apart() -> None:
    before = np.zeros(40)
    after = np.tile([0.0, 1.0], 20)  # the hard ones alone gain
    made = records(before, after)
    found = [row_of(made, difficulty).difference for difficulty in ("all", "easy", "hard")]
    assert found == [0.5, 0, 1]


def test_the_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.3, 1, 60), seed=trial, resamples=1000)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 198
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(np.array([]))


def test_cases_without_a_partner_or_with_an_error_are_not_paired() -> None:
    made = records(np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.4, 0.5]))[:-1]
    made[0]["metrics"] = {}
    assert row_of(made).n == 1


def test_the_planned_cases_find_five_points_4_times_in_5() -> None:
    count = comparisons.cases_needed(0.05)
    assert 600 <= count <= 650
    found = 0
    for trial in range(200):
        rng = np.random.default_rng([11, trial])
        differences = rng.choice([1.0, -1.0, 0.0], size=count, p=[0.125, 0.075, 0.8])  # 5 points, 20 % apart
        found += comparisons.paired_test(differences)[0] < 0.05
    assert 0.70 <= found / 200 <= 0.90
    assert comparisons.resolvable(differences, True) == pytest.approx(0.05, abs=0.005)
    with pytest.raises(ValueError, match="difference ≤ discordant"):
        comparisons.cases_needed(0.3, 0.2)


def test_an_expectation_is_reached_not_reached_or_not_resolved() -> None:
    nothing = np.zeros(1000)
    assert verdict(row_of(records(nothing, shares(0.3, 1000, 1)))) == "reached"
    assert verdict(row_of(records(nothing, shares(0.02, 1000, 2)))) == "not reached"
    assert verdict(row_of(records(nothing, shares(0.11, 1000, 3)))) == "not resolved by this sample"
    for few in (2, 29):  # however clear it looks
        assert verdict(row_of(records(nothing[:few], nothing[:few] + 1))) == "not resolved by this sample"
    # No difference in 30 pairs leaves room for one of 10 points (rule of three), in 31 no longer.
    assert row_of(records(nothing[:30], nothing[:30])).resolvable == pytest.approx(0.1)
    assert verdict(row_of(records(nothing[:29], nothing[:29]))) == "not resolved by this sample"
    assert verdict(row_of(records(nothing[:31], nothing[:31]))) == "not reached"


def test_below_10_cases_there_is_no_interval() -> None:
    """Nine cases that all gain would have one of no width; from ten on it is the plain bootstrap."""
    few = row_of(records(np.zeros(9), np.ones(9)))
    assert (few.n, few.difference, few.ci_low, few.ci_high) == (9, 1, None, None)
    before, after = np.random.default_rng(5).random((2, 10))
    enough = row_of(records(before, after, "error_px"))
    assert (enough.ci_low, enough.ci_high) == bootstrap_interval(after - before)
    assert enough.ci_low is not None
    assert comparisons.interval_of(np.zeros(9)) == (None, None)
    assert comparisons.interval_of(np.zeros(10)) == (0, 0)


def test_resolvable_stays_within_the_range_of_the_metric() -> None:
    assert row_of(records(np.zeros(1), np.ones(1))).resolvable is None  # one pair has no spread
    assert row_of(records(np.zeros(2), np.zeros(2))).resolvable is None  # 3/2 is more than a share can differ
    assert row_of(records(np.zeros(3), np.zeros(3))).resolvable == 1
    errors = records(np.zeros(2), np.array([0.0, 100.0]), "error_px")
    assert row_of(errors).resolvable == pytest.approx(2.802 * 100 / 2)  # no range: as it is
    bounded = {"error_px": Metric("error_px", (), None, False, most=100.0)}
    assert compare_arms(errors, bounded, GROUPS)[0].resolvable is None


def test_the_numbers_of_larger_samples_are_the_published_ones() -> None:
    before, after = np.random.default_rng(8).random((2, 40))
    row = row_of(records(before, after, "error_px"))
    differences = after - before
    assert row.resolvable == 2.802 * float(np.std(differences, ddof=1)) / 40**0.5
    assert (row.ci_low, row.ci_high) == bootstrap_interval(differences, 0, 10_000)


def test_a_small_sample_says_so_and_a_large_one_does_not() -> None:
    def caution(before: np.ndarray, after: np.ndarray, metric: str = "right") -> str:
        rows = compare_arms(records(before, after, metric), {metric: METRICS["right"]}, GROUPS)
        return comparisons.caution([row for row in rows if row.difficulty == "all"])

    assert "Only 5 cases" in caution(np.zeros(5), np.ones(5))
    assert "Only 1 case " in caution(np.zeros(1), np.ones(1))
    assert "Only 29 cases" in caution(np.zeros(29), np.ones(29))
    assert "would be missed" in caution(shares(0.5, 60, 1), shares(0.5, 60, 2))
    assert caution(np.zeros(700), shares(0.1, 700, 3)) == ""
    assert caution(np.zeros(60), np.arange(60.0), "target_difference") == ""  # grey levels are no points
