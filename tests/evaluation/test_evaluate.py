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

from qwen_vision_bridge.case import Case
from qwen_vision_bridge.controls import find_partners, target_levels
from qwen_vision_bridge.evaluation.arms import Arm, default_arms, parse_arm
from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
from qwen_vision_bridge.evaluation.metrics.registry import METRICS
from qwen_vision_bridge.evaluation.report.tables import as_table, write_results
from qwen_vision_bridge.evaluation.scoring import measure, score_reply
from qwen_vision_bridge.evaluation.tasks import Run, content_key
from qwen_vision_bridge.pairs import Edit, EditResult
from qwen_vision_bridge.synthetic.cases import GROUPS, make_cases
from qwen_vision_bridge.synthetic.questions import Question, questions_of
from tests.conftest import made_how

SHORT = {"num_inference_steps": 2}


@pytest.mark.slow
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


@pytest.mark.slow
def test_doing_nothing_scores_worse_than_the_right_edit() -> None:
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


def stripped(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.slow
def test_a_run_writes_everything_and_a_second_one_does_nothing(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"consistency": 2}  # which are partners of one another; the other groups share theirs
    cases = [case for group in GROUPS for case in make_cases(group, counts.get(group, 1), size=64)]
    found = evaluate(editor, cases, tmp_path, **SHORT)
    write_results(tmp_path, found)
    data = json.loads((tmp_path / "results.json").read_text())
    assert {"command", "seeds", "family", "versions", "device", "date"} <= data["provenance"].keys()
    edits = [record for record in data["records"] if record["level"] == "edit"]
    assert len(edits) == 4 * len(cases)
    assert not [record["error"] for record in data["records"] if record["error"]]
    assert {record["arm"] for record in edits} == {"baseline", "bridge", "shuffled", "target-only"}
    assert {record["level"] for record in data["records"]} == {"edit", "perception"}
    assert all((tmp_path / record["image"]).is_file() for record in edits)
    assert all((tmp_path / r["attention"]).is_file() for r in edits if r["arm"] != "baseline")
    shown = next(record for record in edits if record["arm"] == "bridge")
    stem = f"{shown['group']}/{shown['case_id']}"
    for name, arm in {
        shown["image"]: "bridge",
        shown["attention"]: "bridge",
        f"{stem}_input.png": "input",
        f"{stem}_target.png": "target",
    }.items():
        about = made_how(tmp_path / name)
        assert (about["arm"], about["seed"], about["case"]) == (arm, shown["seed"], shown["case_id"])
        assert about["models"] == ["miniature-editor", "miniature-source"]
        assert {"command", "versions", "date"} <= about.keys()
        assert len(json.dumps(about)) < 1000  # a run has thousands
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        assert set(METRICS) <= next(csv.DictReader(file)).keys()
    assert "not resolved by this sample" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "says nothing about a gain" in as_table(found)

    calls, step = [], editor.pipe.scheduler.step
    monkeypatch.setattr(editor.pipe.scheduler, "step", lambda *a, **k: (calls.append(1), step(*a, **k))[1])
    again = evaluate(editor, cases[::-1], tmp_path, **SHORT)
    assert (again.rows, again.records) == (found.rows, found.records)  # whatever the order of the cases
    assert calls == []
    half = [Arm("baseline"), Arm("half", editor.bridge, "random", 0.5)]
    evaluate(editor, cases[:1], tmp_path / "other", half, perception=False, **SHORT)
    assert len(calls) == 2  # the new arm alone: 2 steps; the baseline is known


def test_an_arm_at_strength_0_is_the_baseline_in_every_number(editor: Any, tmp_path: Path) -> None:
    arms = [Arm("baseline"), Arm("off", editor.bridge, "random", 0.0)]
    found = evaluate(editor, make_cases("space", 2, size=64), tmp_path, arms, **SHORT)
    assert found.rows
    assert {(row.difference, row.p_value, row.wins, row.losses) for row in found.rows} == {(0, 1, 0, 0)}


@pytest.mark.slow
def test_a_record_cut_short_by_a_kill_is_run_again(
    editor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = make_cases("detail", 2, seed=0, size=64)
    whole = evaluate(editor, cases, tmp_path, perception=False, **SHORT)
    log = tmp_path / "results.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    again = evaluate(editor, cases, tmp_path, perception=False, **SHORT)
    assert stripped(again.records) == stripped(whole.records)
    assert again.rows == whole.rows
    assert "line 8 is cut short" in caplog.text
    assert again.done_before == 7


@pytest.mark.slow
def test_one_bad_case_is_an_error_and_the_others_go_on(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_cases("detail", 2, seed=0, size=64)
    edit = editor.edit

    def fail(request: Edit) -> EditResult:
        if request.prompt == bad.prompt:
            raise ValueError("no such edit")
        return edit(request)

    monkeypatch.setattr(editor, "edit", fail)
    found = evaluate(editor, [good, bad], tmp_path, perception=False, **SHORT)
    errors = {record["case_id"]: record["error"] for record in found.records}
    assert errors == {good.case_id: None, bad.case_id: "ValueError: no such edit"}
    assert {row.n for row in found.rows} == {1}
    assert any("no such edit" in line for line in found.left_out)


def test_all_arms_see_every_image_and_one_seed(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[Image.Image], int]] = []

    def edit(request: Edit) -> EditResult:
        seen.append((request.images, request.seed))
        return EditResult(case.image, None)

    monkeypatch.setattr(editor, "edit", edit)
    case = make_cases("consistency", 1, kinds=("same_colour",))[0]
    arms = default_arms(editor.bridge, "random")[:2]
    evaluate(editor, [case], tmp_path, arms, perception=False)
    assert [images for images, _ in seen] == [list(case.images)] * 2
    assert len({seed for _, seed in seen}) == 1
    turned = replace(case, references=(case.references[0].rotate(90),))
    evaluate(editor, [turned], tmp_path, arms, perception=False)
    assert len(seen) == 4
    assert (tmp_path / "consistency" / f"{case.case_id}_reference1.png").is_file()


def test_seeds_and_partners_are_those_of_published_results(editor: Any, tmp_path: Path) -> None:
    """Figures in results.json hang on them: they must never change, whatever keys are made of."""
    case = replace(make_cases("ocr", 1)[0], case_id="ocr-128px-test-seed0-0000-change_text")
    assert Run(editor, tmp_path, [Arm("baseline")], 0, {}, {case.case_id: case}).seed_of(case) == 108657124
    partners = find_partners({f"case{number}": ((8, 8),) for number in range(5)}, 0)
    assert partners == {
        "case3": "case1",
        "case1": "case2",
        "case2": "case4",
        "case4": "case0",
        "case0": "case3",
    }


def test_partners_are_a_derangement_on_one_grid() -> None:
    grids = {f"case{i}": ((8, 8),) if i % 3 else ((8, 6),) for i in range(20)} | {"alone": ((2, 2),)}
    partners = find_partners(grids, 0)
    assert partners["alone"] is None
    given = [partner for partner in partners.values() if partner]
    assert len(set(given)) == len(given) == 20
    assert all(one != other and grids[one] == grids[other] for one, other in partners.items() if other)
    assert find_partners(dict(reversed(grids.items())), 0) == partners
    assert find_partners(grids, 1) != partners


@pytest.mark.slow
def test_baselines_are_reused_until_the_pipeline_changes(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(tmp_path / "home"))
    edits: list[str] = []
    stock = type(editor).edit
    monkeypatch.setattr(
        type(editor), "edit", lambda self, edit: (edits.append(edit.prompt), stock(self, edit))[1]
    )
    cases = make_cases("detail", 1, seed=6, size=64)
    weight = next(editor.pipe.transformer.parameters())
    own, other = weight.data, weight.data + 1
    for name, values, expected in (("a", own, 1), ("b", own, 0), ("c", other, 1), ("d", own, 0)):
        edits.clear()
        weight.data = values
        evaluate(editor, cases, tmp_path / name, [Arm("baseline")], perception=False, **SHORT)
        assert len(edits) == expected, name


def test_an_image_shown_at_another_size_has_another_key(editor: Any, tmp_path: Path) -> None:
    (case,) = make_cases("detail", 1, seed=6, size=64)
    keys = set()
    family = editor.family
    try:
        for changes in ({}, {"condition_area": 32 * 32}, {"condition_step": 32}):
            editor.family = replace(family, editor=replace(family.editor, **changes))
            run = Run(editor, tmp_path, [Arm("baseline")], 0, {}, {case.case_id: case})
            keys.add(content_key(run, case, run.arms[0], False))
    finally:
        editor.family = family
    assert len(keys) == 3


def test_another_prompt_on_the_same_image_is_no_partner(editor: Any, tmp_path: Path) -> None:
    case, other = make_cases("detail", 2, size=64)
    twin = replace(case, case_id="twin", prompt="something else")
    arms = [Arm("baseline"), Arm("shuffled", editor.bridge, "random", features="shuffled")]
    alone = Run(editor, tmp_path, arms, 0, {}, {c.case_id: c for c in (case, twin)})
    assert set(alone.partners.values()) == {None}
    three = Run(editor, tmp_path, arms, 0, {}, {c.case_id: c for c in (case, twin, other)})
    assert three.partners["twin"] == three.partners[case.case_id] == other.case_id


def test_target_only_levels_are_the_targets_own_features_turned(editor: Any) -> None:
    import torch

    features = torch.randn(20, 224, generator=torch.Generator().manual_seed(0))
    cache = target_levels(editor.bridge.config)(features, ((4, 5),))
    assert cache.late_features.shape == (1, 20, 256)
    seen = cache.early_features[0]
    assert torch.allclose(seen @ seen.T, features @ features.T, atol=1e-2)  # lengths and angles are kept


def test_arms_are_read_from_text_and_wrong_ones_are_refused(editor: Any, tmp_path: Path) -> None:
    arm = parse_arm("half=random,strength=0.5,site=deepstack,features=shuffled", editor.family)
    assert (arm.strength, arm.site, arm.features, arm.is_baseline) == (0.5, "deepstack", "shuffled", False)
    for text, says in (
        ("half", "an arm is NAME=BRIDGE"),
        ("x=random,what=1", "an arm is"),
        ("x=random,strength=a", "number"),
        ("x=random,site=moon", "site is one of"),
        ("x=random,features=none", "features is one of"),
        ("a/b=random", "name is letters"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_arm(text, editor.family)
    case = make_cases("detail", 1)[0]
    with pytest.raises(ValueError, match="one arm is the baseline"):
        evaluate(editor, [case], tmp_path, [arm])
    with pytest.raises(ValueError, match="each needs its own"):
        evaluate(editor, [case, case], tmp_path)
    with pytest.raises(ValueError, match="file name"):
        replace(case, case_id="../up")
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            evaluate(editor, [case], tmp_path, seed=seed)


def test_replies_are_scored_by_hand_computed_values() -> None:
    assert score_reply(Question("read", "", "CAFE"), " cafe")["answered"] == 1
    assert score_reply(Question("read", "", "CAFE"), "CUFE") == {
        "answered": 0.0,
        "letters": 0.75,
        "reply_similarity": 0.75,
    }
    assert score_reply(Question("locate", "", "aa"), "de")["location_error"] == pytest.approx(5 / 8)  # 3-4-5
    assert score_reply(Question("locate", "", "aa"), "left")["location_error"] == 2**0.5
    assert score_reply(Question("count", "", "3"), "5") == {"answered": 0.0, "count_error": 2.0}
    assert score_reply(Question("count", "", "3"), "many")["count_error"] == 8
    kinds = {question.kind for case in make_cases("ocr", 4) for question in questions_of(case)}
    assert kinds == {"read", "locate", "count"}


def test_edits_of_another_size_than_the_case_are_refused() -> None:
    case = make_cases("ocr", 1)[0]
    with pytest.raises(ValueError, match=r"\(64, 64\) px.*\(128, 128\) px"):
        measure(case, Image.new("RGB", (64, 64)))


@pytest.mark.slow
def test_a_strip_that_the_editor_cannot_do_is_one_error(editor: Any, tmp_path: Path) -> None:
    """Its time is not estimated, it is no partner, and the others have their records and rows."""
    good = make_cases("detail", 1, seed=0)[0]
    strip = Case("a-strip", "detail", "own", "Make it red.", Image.new("RGB", (800, 8)), dataset="own")
    said: list[str] = []
    options = EvaluationOptions(announce=said.append)
    found = evaluate(editor, [strip, good], tmp_path, perception=False, options=options, **SHORT)
    errors = {(record["case_id"], bool(record["error"])) for record in found.records}
    assert errors == {(good.case_id, False), ("a-strip", True)}
    assert len(said) == 1
    assert any("800×8 px, longer than the 16:1" in line for line in found.left_out)
