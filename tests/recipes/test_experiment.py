"""The experiment's rows are paired over cases, with seeds averaged within a case."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest


def record(arm: str, case: str, value: float, seed: int = 0, difficulty: str = "hard") -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "group": "ocr",
        "difficulty": difficulty,
        "case": case,
        "metrics": {"letters": value},
    }


def test_rows_pair_cases_and_average_seeds_within_them() -> None:
    from recipes.experiment.results import rows_of, table

    records = [
        record("baseline", "a", 0.5),
        record("baseline", "b", 1.0, difficulty="easy"),
        record("baseline", "unpaired", 0.0),
        {**record("perceive", "a", 0.0, seed=7), "group": "another group, another seed"},
        *(record("perceive", "a", value, seed) for seed, value in enumerate((1.0, 0.8, 0.6))),
        record("perceive", "b", 1.0, difficulty="easy"),
        record("shuffled", "a", 0.4),
    ]
    rows = {(row["arm"], row["difficulty"]): row for row in rows_of(records, "perception")}
    hard = rows["perceive", "hard"]
    assert (hard["n"], hard["seeds"], hard["against"]) == (1, [0, 1, 2], "baseline")
    assert hard["diff"] == pytest.approx(0.3)
    both = rows["perceive", "all"]
    assert (both["n"], both["baseline"]) == (2, 0.75)
    assert both["diff"] == pytest.approx(0.15)
    assert both["ci_low"] <= both["diff"] <= both["ci_high"]
    (against,) = (
        row
        for row in rows_of(records, "perception", "shuffled")
        if row["arm"] == "perceive" and row["difficulty"] == "all"
    )
    assert against["diff"] == pytest.approx(0.4)
    assert "| perception | ocr | hard | perceive | letters | 1 | 3 | 0.500 | 0.800 |" in table([hard])


def test_seeds_that_say_what_the_baseline_says_have_no_difference_at_all() -> None:
    """A third of three times 0.1 is not 0.1 in floating point."""
    from recipes.experiment.results import rows_of

    records = [record("baseline", "a", 0.1), *(record("perceive", "a", 0.1, seed) for seed in range(3))]
    (row, _) = rows_of(records, "perception")
    assert (row["diff"], row["ci_low"], row["ci_high"]) == (0, 0, 0)


def test_level_shares_are_means_over_the_edits_of_an_arm() -> None:
    from recipes.experiment.results import level_shares

    weights = [{"early": 0.2, "late": 0.8}, {"early": 0.6, "late": 0.4}]
    records = [{**record("perceive", "a", 1.0), "level_weights": one} for one in (*weights, None)]
    assert level_shares(records) == [
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


def test_figures_are_drawn(tmp_path: Path) -> None:
    from recipes.experiment.results import draw_curve, draw_differences, rows_of

    records = [
        record(arm, case, value) for arm, value in (("baseline", 0.4), ("perceive", 0.7)) for case in "ab"
    ]
    draw_differences(rows_of(records, "perception"), tmp_path / "a.png", "perception", "letters")
    draw_curve([(0.0, 0.0, 0.0, 0.0), (1.0, 0.1, 0.05, 0.2)], tmp_path / "b.png", "strength")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("a.png", "b.png"))


def test_a_design_comes_behind_what_it_starts_from() -> None:
    from recipes.experiment.designs import EXTRA, with_starts

    names = [design.name for design in with_starts([EXTRA["perceive+edit"], EXTRA["rank-4"]])]
    assert names == ["calibrated", "perceive", "perceive+edit", "calibrated-rank-4", "rank-4"]
    assert all(design.start is None or design.start in EXTRA for design in EXTRA.values())


def test_a_shuffled_edit_without_a_partner_says_what_to_change() -> None:
    from types import SimpleNamespace

    from recipes.experiment.editing import _request

    arm, case = SimpleNamespace(features="shuffled", bridge=object()), SimpleNamespace(case_id="unpaired")
    with pytest.raises(ValueError, match="unpaired: no other image of its part has its grid; take fewer"):
        _request(SimpleNamespace(arms=[arm], partners={"unpaired": None}), case)


class Bench:
    """Stands for the frozen models."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_jobs_wait_for_what_they_need() -> None:
    from recipes.experiment.hands import Hands, Job

    bench, done = Bench(), []

    def work(given: Bench, name: str) -> str:
        assert given is bench
        done.append(name)
        return f"{name} is done"

    jobs = {
        "last": Job(work, ("last",), ("first", "other")),
        "first": Job(work, ("first",)),
        "other": Job(work, ("other",), ("first",)),
    }
    with Hands(lambda: bench) as hands:
        found = hands.do(jobs)
        assert done == ["first", "other", "last"]
        assert found["last"] == "last is done"
        with pytest.raises(KeyError, match="needs 'nothing'"):
            hands.do({"one": Job(work, ("one",), ("nothing",))})
    assert bench.closed


class BenchWithChildren(Bench):
    """Has processes of its own, as one that measures has."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def close(self) -> None:
        self.pool.shutdown()


def _sum_elsewhere(bench: BenchWithChildren, *numbers: int) -> int:
    return bench.pool.submit(sum, numbers).result()


def test_processes_that_have_processes_end() -> None:
    from recipes.experiment.hands import Hands, Job

    with Hands(BenchWithChildren, 1) as hands:
        jobs = {n: Job(_sum_elsewhere, (n, 1), tuple(range(n))) for n in range(3)}
        assert hands.do(jobs) == {0: 1, 1: 2, 2: 3}
    # Here this would hang if the child did not end.


def test_records_are_kept_by_everything_that_decides_them(tmp_path: Path) -> None:
    from recipes.experiment.asking import Exam, keep_records, read_records
    from recipes.experiment.editing import Edits

    exam = Exam("test", ("ocr",), 5)
    some = [
        exam,
        exam._replace(split="novel"),
        exam._replace(count=6),
        exam._replace(strength=0.5),
        exam._replace(only="read"),
    ]
    places = {one.kept(tmp_path, "ocr", arm, seed) for one in some for arm in "ab" for seed in (0, 1)}
    edits = Edits("test", "ocr", 5, 20, 8)
    more = [
        edits,
        edits._replace(group="space"),
        edits._replace(site="deepstack"),
        edits._replace(part=1, parts=2),
        edits._replace(parts=2),
    ]
    places |= {one.kept(tmp_path, arm, 0) for one in more for arm in "ab"}
    assert len(places) == 5 * 4 + 5 * 2
    keep_records(min(places), [record("a", "x", 0.5)])
    assert read_records(min(places)) == [record("a", "x", 0.5)]


def test_edits_are_drawn_by_the_pipeline_and_measured_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    from zipfile import ZipFile

    import numpy as np
    from PIL import Image

    from qwen_vision_bridge.evaluation.tasks import Run
    from recipes.experiment.bench import Bench
    from recipes.experiment.designs import EXTRA
    from recipes.experiment.editing import Edits, draw, measure

    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(tmp_path / "home"))
    bench, edits = Bench(tmp_path, samples=4, workers=0), Edits("test", "space", 1, 2, 1)
    (case,) = edits.cases()
    images = {}
    for arm in ("baseline", "fresh", "sharp"):
        if arm != "baseline":
            bench.train(EXTRA[arm], 0)
        draw(bench, arm, 0, edits)
        with ZipFile(edits.drawn(tmp_path, arm, 0)) as file:
            images[arm] = np.asarray(Image.open(io.BytesIO(file.read(f"{case.case_id}.webp"))))
    noise = Run(bench.pipeline, tmp_path, [], 0, {}, {}).seed_of(case)
    stock = bench.pipeline.generate(case.image, case.prompt, False, seed=noise, num_inference_steps=2)
    assert np.array_equal(images["baseline"], np.asarray(stock))
    assert np.array_equal(images["baseline"], images["fresh"])
    assert not np.array_equal(images["baseline"], images["sharp"])
    (found,) = measure(bench, "fresh", 0, edits)
    assert (found["arm"], found["case"]) == ("fresh", case.case_id)
    assert {"right", "unedited_ssim", "target_difference"} <= found["metrics"].keys()
    assert sum(found["level_weights"].values()) == pytest.approx(1.0, abs=1e-5)
    edits.drawn(tmp_path, "fresh", 0).unlink()
    assert measure(bench, "fresh", 0, edits) == [found]  # what is measured is not measured again


def test_every_arm_and_seed_is_edited_in_every_group(tmp_path: Path) -> None:
    from recipes.experiment.designs import ARMS
    from recipes.experiment.run import SITES, _arguments, _edits

    given = ["final", "--folder", str(tmp_path), "--seeds", "0", "1", "--parts", "2", "--detail-seeds", "1"]
    edits = _edits(ARMS, _arguments(given), "test", 8)
    trained = [arm.name for arm in ARMS if arm.is_trained]
    for group, count in (("ocr", 2), ("space", 2), ("detail", 1)):
        some = [(arm, seed) for arm, seed, one in edits if one.group == group]
        assert {arm for arm, _ in some} == {"baseline", *(arm.name for arm in ARMS)}
        assert all(some.count((arm, seed)) == 2 for arm in trained for seed in range(count))  # two parts each
        assert len(some) == 2 * (1 + len(ARMS) - len(trained) + count * len(trained))
    sites = [
        one.site for arm, _, one in _edits(ARMS, _arguments(given), "test", 8, SITES) if arm == "perceive"
    ]
    assert set(sites) == set(SITES)
    assert _edits(ARMS, _arguments(given), "test", 0) == []
