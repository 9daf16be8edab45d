"""Paired differences of two arms: interval, test, wins and losses, and what the sample can resolve.

Everything is a function of the pairs alone: their order never matters, and equal arms give exactly zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .metrics.registry import METRICS, Metric

RESAMPLES = 10_000
FEW = 30  # below this many cases a bootstrap interval is too narrow to be believed
FEWEST = 10  # below this many cases there is no interval: resampling a handful shows nothing but the handful
# Standard errors between nothing and an effect that a two-sided test at 5 % finds 4 times in 5.
POWER_FACTOR = 1.960 + 0.842
EXPECTED = {"ocr": (0.10, 0.15), "space": (0.05, 0.10), "detail": (0.05, 0.05)}
"""Gain that was expected of a bridge in the headline share, least and most."""
DISCORDANT = 0.2  # share of cases that two arms decide differently, assumed for planning
BASELINE = "baseline"
Cases = dict[str, dict[str, Mapping[str, Any]]]
"""Records by case id and arm."""


class Difference(NamedTuple):
    """One metric of one arm beside the baseline, over the cases that both have."""

    level: str
    """`edit`, `perception`, or `agreement` of edits with one prompt."""
    group: str
    difficulty: str
    """`easy`, `hard`, or `all`."""
    arm: str
    metric: str
    higher_is_better: bool | None
    n: int
    baseline: float
    value: float
    difference: float
    """Mean of arm minus baseline."""
    ci_low: float | None
    """Lower end of the 95 % percentile bootstrap interval of the mean paired difference; None below `FEWEST`
    cases."""
    ci_high: float | None
    p_value: float
    test: str
    """`sign` where a pair can only win, tie or lose by one; else `wilcoxon`."""
    wins: int
    """Pairs in which the arm is better, whichever direction that is."""
    ties: int
    losses: int
    resolvable: float | None
    """Smallest true difference that a sample like this finds 4 times in 5, in the metric's unit; None where
    the metric can differ by no more than that, or a single pair says nothing."""


class Expectation(NamedTuple):
    """An expected gain beside the measured one."""

    measured: Difference
    expected_low: float
    expected_high: float
    verdict: str
    """`reached`, `not reached` or `not resolved by this sample`."""


def bootstrap_interval(
    differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13), seeded.

    Args:
        differences: (n,) paired differences; their order does not matter.

    Raises:
        ValueError: no differences.
    """
    if len(differences) == 0:
        raise ValueError("an interval needs at least one paired difference")
    values = np.sort(np.asarray(differences, dtype=float))
    if values[0] == values[-1]:  # no spread, and none from rounding either
        return float(values[0]), float(values[0])
    means = values[_picks(len(values), seed, resamples)].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def interval_of(differences: np.ndarray, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """`bootstrap_interval`, or None twice where there are fewer than `FEWEST` differences."""
    return bootstrap_interval(differences, seed) if len(differences) >= FEWEST else (None, None)


@lru_cache(maxsize=4)
def _picks(count: int, seed: int, resamples: int) -> np.ndarray:
    """(resamples, count) indices: many metrics share one sample, and drawing costs more than using."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count), dtype=np.int32)


def paired_test(differences: np.ndarray) -> tuple[float, str]:
    """Two-sided p-value that pairs differ by chance alone, and the test's name.

    Differences of -1, 0 and 1 alone get the exact sign test over the pairs that differ, which is McNemar's
    (1947); others Wilcoxon's signed-rank test (1945) over the pairs that differ. All equal gives 1.
    """
    from scipy.stats import binomtest, wilcoxon

    changed = differences[differences != 0]
    binary = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())
    p_value = 1.0
    if len(changed):
        wins = int((changed > 0).sum())
        test = binomtest(wins, len(changed)) if binary else wilcoxon(np.sort(changed))
        p_value = float(test.pvalue)
    return p_value, "sign" if binary else "wilcoxon"


def resolvable(differences: np.ndarray, share: bool = False, span: float | None = None) -> float | None:
    """The smallest true mean difference that a paired test at 5 % finds with 80 % power, metric's unit.

    2.80 standard errors of the mean (Cohen 1988, chapter 2). A sample of a share without any difference may
    still hide one of 3/n (Hanley and Lippman-Hand 1983, the rule of three).

    Args:
        differences: (n,) paired differences.
        share: whether they are of a share.
        span: the largest difference that the metric allows, where there is one.

    Returns:
        None for a single pair, and where no difference within the span would be found.
    """
    if len(differences) < 2:
        return None
    least = 3 / len(differences) if share else 0.0
    found = max(POWER_FACTOR * float(np.std(differences, ddof=1)) / len(differences) ** 0.5, least)
    return None if span is not None and found > span else found


def cases_needed(difference: float, discordant: float = DISCORDANT) -> int:
    """Pairs for which a difference of two shares is found with 80 % power at 5 %.

    Args:
        difference: of the shares, such as 0.05.
        discordant: share of pairs in which the arms differ; its square root bounds the spread.

    Raises:
        ValueError: a difference that is not above 0, or discordance below it.
    """
    if not 0 < difference <= discordant <= 1:
        raise ValueError(f"0 < difference ≤ discordant ≤ 1 is needed, got {difference} and {discordant}")
    return int(np.ceil(POWER_FACTOR**2 * (discordant - difference**2) / difference**2))


def compare_arms(
    records: Iterable[Mapping[str, Any]],
    metrics: Mapping[str, Metric],
    groups: Sequence[str],
    seed: int = 0,
    against: str = BASELINE,
) -> list[Difference]:
    """Every arm beside the baseline: by level, group, difficulty and metric, in that order.

    Args:
        records: with `level`, `case_id`, `group`, `difficulty`, `arm` and `metrics`; those with an error or
            without a metric are left out of its pairs.
        metrics: what is compared, in the order of the table.
        groups: in the order of the table.
        seed: of the bootstrap.
        against: the arm that takes the place of the baseline.
    """
    records = sorted(records, key=lambda record: record["case_id"])
    table = by_case(records, "level", "group")
    arms = [arm for arm in dict.fromkeys(record["arm"] for record in records) if arm != against]
    rows = []
    for level, group, arm in itertools.product(("perception", "edit", "agreement"), groups, arms):
        cases = table.get((level, group), {}).values()
        pairs = [(case[against], case[arm]) for case in cases if {against, arm} <= set(case)]
        for difficulty in ("all", "easy", "hard"):
            some = [pair for pair in pairs if difficulty in ("all", pair[0]["difficulty"])]
            if difficulty == "all" or 0 < len(some) < len(pairs):
                rows += _rows(some, (level, group, difficulty, arm), metrics, seed)
    return rows


def by_case(records: Iterable[Mapping[str, Any]], *labels: str) -> dict[tuple[str, ...], Cases]:
    """Records by the values of some labels, then by case id, then by arm."""
    table: dict[tuple[str, ...], Cases] = {}
    for record in records:
        cases = table.setdefault(tuple(record[label] for label in labels), {})
        cases.setdefault(record["case_id"], {})[record["arm"]] = record
    return table


def _rows(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    labels: tuple[str, str, str, str],
    metrics: Mapping[str, Metric],
    seed: int,
) -> list[Difference]:
    rows = []
    for name, metric in metrics.items():
        values = [[record["metrics"].get(name) for record in pair] for pair in pairs]
        both = np.array([pair for pair in values if None not in pair], dtype=float)  # (n, 2)
        if not len(both):
            continue
        differences = both[:, 1] - both[:, 0]
        sign = {True: 1, False: -1, None: 0}[metric.higher_is_better]
        wins, losses = int((sign * differences > 0).sum()), int((sign * differences < 0).sum())
        low, high = interval_of(differences, seed)
        p_value, test = paired_test(differences)
        rows.append(
            Difference(
                *labels,
                name,
                metric.higher_is_better,
                len(both),
                float(both[:, 0].mean()),
                float(both[:, 1].mean()),
                float(np.sort(differences).mean()),
                low,
                high,
                p_value,
                test,
                wins,
                len(both) - wins - losses,
                losses,
                resolvable(differences, metric.is_share, metric.span),
            )
        )
    return rows


def judge_expectations(
    rows: Iterable[Difference], headlines: Mapping[str, str], arms: Sequence[str]
) -> list[Expectation]:
    """The expected gains beside the measured ones.

    *Reached* means the whole interval is at or above the least that was expected, *not reached* that the
    whole interval is below it. Anything else, fewer than `FEW` pairs, or a sample that would miss such a
    gain more than once in five, is *not resolved by this sample*.

    Args:
        headlines: the metric by level.
        arms: for which a gain was expected; controls are no such arms.
    """
    expectations = []
    for row in rows:
        headline = row.difficulty == "all" and row.metric == headlines.get(row.level)
        if not headline or row.group not in EXPECTED or row.arm not in arms:
            continue
        low, high = EXPECTED[row.group]
        verdict = "not resolved by this sample"
        if row.n >= FEW and row.ci_low is not None and row.ci_high is not None:
            if row.ci_low >= low:
                verdict = "reached"
            elif row.ci_high < low and row.resolvable is not None and row.resolvable <= low:
                verdict = "not reached"
        expectations.append(Expectation(row, low, high, verdict))
    return expectations


def caution(headlines: Sequence[Difference]) -> str:
    """What the sample cannot carry, in a sentence or two; "" where 5 points would be seen everywhere."""
    fewest = min((row.n for row in headlines), default=0)
    shares = [row for row in headlines if METRICS[row.metric].is_share]
    worst = max((row.resolvable for row in shares if row.resolvable is not None), default=0.0)
    needed = f"A 5-point difference needs about {cases_needed(0.05)} cases a group."
    if fewest < FEWEST:
        cases = "1 case" if fewest == 1 else f"{fewest} cases"
        return (
            f"Only {cases} in a group: this shows that everything runs, and says nothing about a gain there. "
            + needed
        )
    if fewest < FEW:
        return f"Only {fewest} cases in a group: its interval is too narrow to be believed. {needed}"
    if worst > 0.05:
        points = 100 * worst
        return f"Differences below {points:.0f} points would be missed in some group: more cases are needed."
    return ""
