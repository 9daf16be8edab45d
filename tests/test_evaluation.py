"""The evaluation measures real edits, pairs them, and goes on where it stopped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.evaluation import (
    ARMS,
    HIGHER_IS_BETTER,
    as_table,
    bootstrap_interval,
    evaluate,
    measure,
    summarise,
)
from qwen_vision_bridge.world import GROUPS, make_cases

SHORT = {"num_inference_steps": 2}


def test_a_right_edit_scores_perfectly_in_every_group() -> None:
    for group in GROUPS:
        for case in make_cases(group, 6, seed=3):
            scores = measure(case, case.target)
            assert scores["right"] == 1, case.case_id
            assert scores["unedited_ssim"] == pytest.approx(1), case.case_id
            assert scores["target_difference"] == 0
            assert scores.get("exact_text", 1) == 1, case.case_id
            assert scores.get("objects_lost", 0) == 0
            assert scores.get("centroid_error_px", 0) < 2


def test_doing_nothing_scores_worse_than_the_right_edit_where_it_matters() -> None:
    for case in make_cases("ocr", 4, seed=3, kinds=("change_text", "remove_word")):
        assert measure(case, case.image)["exact_text"] == 0
    for case in make_cases("space", 4, seed=3, kinds=("move_left", "swap")):
        assert measure(case, case.image)["centroid_error_px"] > 10
    for case in (case for group in GROUPS for case in make_cases(group, 4, seed=3)):
        assert measure(case, case.image)["right"] == 0, case.case_id


def test_damage_outside_the_edit_is_seen_and_inside_it_is_not() -> None:
    case = next(case for case in make_cases("detail", 9, seed=1) if 0 < case.edit_mask.mean() < 0.3)
    pixels = np.asarray(case.target).copy()
    inside = pixels.copy()
    inside[case.edit_mask] = 0
    assert measure(case, Image.fromarray(inside))["unedited_ssim"] == pytest.approx(1)
    outside = pixels.copy()
    outside[~case.edit_mask] = 255 - outside[~case.edit_mask]
    assert measure(case, Image.fromarray(outside))["unedited_ssim"] < 0.7


def records(baseline: list[float], enhanced: list[float]) -> list[dict[str, Any]]:
    return [
        {"case_id": str(number), "group": "ocr", "arm": arm, "metrics": {"edit_similarity": value}}
        for number, pair in enumerate(zip(baseline, enhanced, strict=True))
        for arm, value in zip(ARMS, pair, strict=True)
    ]


def test_identical_arms_differ_by_exactly_zero() -> None:
    values = list(np.random.default_rng(0).random(40))
    (row,) = summarise(records(values, values))
    assert (row.difference, row.ci_low, row.ci_high) == (0, 0, 0)


def test_a_planted_gain_is_found_and_the_order_of_cases_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.random(60)
    made = records(list(baseline), list(baseline + 0.1 + 0.05 * rng.normal(size=60)))
    (row,) = summarise(made)
    assert row.ci_low > 0
    assert row.difference == pytest.approx(0.1, abs=0.03)
    shuffled = [made[i] for i in rng.permutation(len(made))]
    assert summarise(shuffled)[0].difference == pytest.approx(row.difference)


def test_cases_with_one_arm_only_are_not_paired() -> None:
    made = records([0.1, 0.2], [0.3, 0.4])[:-1]
    assert summarise(made)[0].n == 1


def test_the_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.3, 1, 60), seed=trial, resamples=1000)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 198
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(np.array([]))


def test_a_run_writes_everything_and_a_second_one_does_nothing(editor: Any, tmp_path: Path) -> None:
    cases = [case for group in GROUPS for case in make_cases(group, 1, seed=0)]
    summaries = evaluate(editor, cases, tmp_path, **SHORT)
    data = json.loads((tmp_path / "results.json").read_text())
    assert {"command", "seeds", "family", "versions", "device", "date"} <= data["provenance"].keys()
    assert len(data["records"]) == 2 * len(cases)
    assert {row.group for row in summaries} == set(GROUPS)
    firsts = [next(row.metric for row in summaries if row.group == group) for group in GROUPS]
    assert firsts == ["right"] * len(GROUPS)
    assert {record["difficulty"] for record in data["records"]} <= {"easy", "hard"}
    assert all(record["metrics"]["right"] in (0, 1) for record in data["records"])
    assert all((tmp_path / record["picture"]).is_file() for record in data["records"])
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == set(ARMS)
    assert set(HIGHER_IS_BETTER) <= rows[0].keys()
    assert "95 % interval" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    table = as_table(summaries).splitlines()
    assert len(table) == 1 + len(summaries) + 1
    assert "says nothing about a gain" in table[-1]

    calls = []
    handle = editor.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert evaluate(editor, cases, tmp_path, **SHORT) == summaries
        assert calls == []
        evaluate(editor, cases, tmp_path, strength=0.5, **SHORT)
        assert len(calls) == len(cases) * 2 * 2  # the enhanced arm alone: 2 steps, 2 prompts
    finally:
        handle.remove()


def test_a_record_cut_short_by_a_kill_is_run_again_and_the_others_are_kept(
    editor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = make_cases("detail", 2, seed=0)
    whole = evaluate(editor, cases, tmp_path, **SHORT)
    log = tmp_path / "results.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert evaluate(editor, cases, tmp_path, **SHORT) == whole
    assert "line 4 is cut short" in caplog.text
    assert len([line for line in log.read_text().splitlines() if line.startswith("{")]) == 5


def test_an_edit_sees_every_picture_of_its_prompt_and_its_key_names_them(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def generate(pictures: Any, *_: Any, **__: Any) -> Image.Image:
        seen.append(pictures)
        return case.image

    monkeypatch.setattr(editor, "generate", generate)
    case = make_cases("consistency", 1, kinds=("same_colour",))[0]
    turned = replace(case, references=(case.references[0].rotate(90),))
    evaluate(editor, [case], tmp_path)
    evaluate(editor, [turned], tmp_path)
    assert seen == [case.pictures] * 2 + [turned.pictures] * 2
    done = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in done}) == len(done) == 4
    assert (tmp_path / "consistency" / f"{case.case_id}_reference1.png").is_file()
    single = make_cases("detail", 1)[0]
    evaluate(editor, [single], tmp_path)
    assert seen[-1] is single.image  # the first edit pipeline takes one picture and no list


def test_edits_of_another_size_than_the_case_are_refused_by_the_measure() -> None:
    case = make_cases("ocr", 1)[0]
    with pytest.raises(ValueError, match=r"\(64, 64\) px.*\(128, 128\) px"):
        measure(case, Image.new("RGB", (64, 64)))


def test_few_cases_are_said_to_prove_nothing_and_many_are_not() -> None:
    values = list(np.random.default_rng(0).random(40))
    assert "Only 5 cases" in as_table(summarise(records(values[:5], values[5:10])))
    assert "Only" not in as_table(summarise(records(values, values[::-1])))
