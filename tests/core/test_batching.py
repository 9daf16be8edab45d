"""Edits made together are those made alone, up to the arithmetic of a batch, and never mixed with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.batching import Prepared
from qwen_vision_bridge.evaluation.arms import Arm
from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
from qwen_vision_bridge.pairs import Edit
from qwen_vision_bridge.synthetic.cases import make_cases
from tests.conftest import SMALL

SHORT = {"num_inference_steps": 2}
CLOSE = 2  # grey levels of 255: how far an image of a batch may be from the one made alone


def farthest(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def edits_of(editor: Any, cases: list[Any]) -> list[Edit]:
    arms = [{}, *({"bridge": editor.bridge, "strength": strength} for strength in (0.0, 3.0))]
    return [
        replace(editor.check_edit(case.images, case.prompt, 7 + index, **SHORT), **arm)
        for index, case in enumerate(cases)
        for arm in arms
    ]


@pytest.mark.slow
def test_a_batch_of_one_is_the_stock_call_bit_for_bit(editor: Any) -> None:
    case = make_cases("consistency", 1, size=64)[0]
    for edit in edits_of(editor, [case]):
        alone, attention = editor.edit(edit)
        prepared = editor.prepare(edit)
        assert farthest(editor.denoise([prepared])[0], alone) == 0
        assert (prepared.attention is None) == (attention is None)


@pytest.mark.slow
def test_edits_of_a_batch_are_close_to_those_alone_in_order(editor: Any) -> None:
    cases = make_cases("ocr", 2, size=64) + make_cases("space", 1, size=64)
    edits = edits_of(editor, cases)
    prepared = [editor.prepare(edit) for edit in edits]
    lengths = {edit.prompts[0][0].shape[1] for edit in prepared}
    assert len(lengths) > 1  # so that padding and its mask are at work
    together = editor.denoise(prepared)
    alone = [editor.edit(edit).image for edit in edits]
    assert max(map(farthest, together, alone)) <= CLOSE
    for first in range(0, len(edits), 3):
        assert farthest(together[first], together[first + 2]) > 5 * CLOSE  # the bridge is in its own arm


@pytest.mark.slow
def test_the_padding_of_a_batch_is_never_seen(editor: Any) -> None:
    import torch

    short, long = (editor.prepare(edits_of(editor, [case])[0]) for case in make_cases("ocr", 2, size=64))
    alone = editor.denoise([short])[0]
    embeds, _ = short.prompts[0]
    noise = 50 * torch.randn(1, 9, embeds.shape[-1], generator=torch.Generator().manual_seed(0))
    seen = torch.ones(1, embeds.shape[1] + 9, dtype=torch.bool)
    seen[:, embeds.shape[1] :] = False
    dirty = (torch.cat([embeds, noise.to(embeds)], 1), seen.to(embeds.device))
    masked = short._replace(prompts=(dirty, *short.prompts[1:]))
    assert farthest(editor.denoise([masked, long])[0], alone) <= CLOSE


def test_edits_that_cannot_share_a_batch_are_refused(editor: Any) -> None:
    case = make_cases("detail", 1, size=64)[0]
    inputs = [(case.image, 2), (case.image.resize((128, 64)), 2), (case.image, 3)]
    one, other, longer = (
        editor.prepare(editor.check_edit(image, case.prompt, num_inference_steps=steps))
        for image, steps in inputs
    )
    before = vars(editor.pipe).keys() - {"_callback_tensor_inputs"}
    for edits in ([one, other], [one, longer], []):
        with pytest.raises(ValueError, match="same sizes"):
            editor.denoise(edits)
    with pytest.raises(ValueError, match="prompt"):
        editor.check_edit(case.image, " ")
    assert {"encode_prompt", "prepare_latents"}.isdisjoint(vars(editor.pipe))
    assert before <= vars(editor.pipe).keys()
    assert editor.pipe.vae.use_slicing is False


@pytest.mark.slow
def test_the_first_edit_pipeline_denoises_together_too(pipe: Any, photo: Image.Image) -> None:
    import diffusers
    import torch

    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    first = diffusers.QwenImageEditPipeline(**pipe.components)
    first.set_progress_bar_config(disable=True)
    editor = EnhancedQwenImageEdit(SMALL, bridge="random", pipe=first, dtype=torch.float32)
    edits = [editor.check_edit(photo, prompt, **SHORT) for prompt in ("a", "make the suit blue")]
    together = editor.denoise([editor.prepare(edit) for edit in edits])
    assert max(map(farthest, together, [editor.edit(edit).image for edit in edits])) <= CLOSE


@pytest.mark.slow
def test_a_batched_run_has_equal_records_under_other_keys(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases("space", 2, size=64) + make_cases("consistency", 1, size=64)
    arms = [
        Arm("baseline"),
        Arm("off", editor.bridge, "random", 0.0),
        Arm("on", editor.bridge, "random", 2.0),
    ]
    sizes: list[int] = []
    denoise = editor.denoise

    def counted(edits: list[Prepared]) -> list[Image.Image]:
        sizes.append(len(edits))
        return denoise(edits)

    monkeypatch.setattr(editor, "denoise", counted)
    alone = evaluate(editor, cases, tmp_path, arms, **SHORT)
    assert sizes == []
    together = evaluate(editor, cases, tmp_path, arms, options=EvaluationOptions(batch_arms=6), **SHORT)
    assert sorted(sizes) == [3, 6]
    edits = [[r for r in found.records if r["level"] == "edit"] for found in (alone, together)]
    assert together.done_before == len(alone.records) - len(edits[0])  # the questions alone
    assert {r["key"] for r in edits[0]}.isdisjoint(r["key"] for r in edits[1])
    for one, other in zip(*edits, strict=True):
        assert (one["case_id"], one["arm"], one["seed"]) == (other["case_id"], other["arm"], other["seed"])
        shown = [Image.open(tmp_path / record["image"]) for record in (one, other)]
        assert farthest(*shown) <= CLOSE
        assert one["metrics"].keys() == other["metrics"].keys()
        difference = one["metrics"]["target_difference"] - other["metrics"]["target_difference"]
        assert abs(difference) < 0.1
    again = evaluate(editor, cases, tmp_path, arms, options=EvaluationOptions(batch_arms=6), **SHORT)
    assert again.done_before == len(again.records)
    with pytest.raises(ValueError, match="batch_arms"):
        evaluate(editor, cases, tmp_path, arms, options=EvaluationOptions(batch_arms=0), **SHORT)


@pytest.mark.slow
def test_a_bad_edit_of_a_batch_is_an_error_and_is_retried(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_cases("detail", 2, size=64)
    prepare = editor.prepare

    def fail(edit: Edit) -> Prepared:
        if edit.prompt == bad.prompt:
            raise ValueError("no such edit")
        return prepare(edit)

    arms = [Arm("baseline"), Arm("on", editor.bridge, "random", 2.0)]
    same = {"arms": arms, "perception": False, "num_inference_steps": 3}
    batched = EvaluationOptions(batch_arms=4)
    with monkeypatch.context() as patch:
        patch.setattr(editor, "prepare", fail)
        found = evaluate(editor, [good, bad], tmp_path, options=batched, **same)
    errors = {record["case_id"]: record["error"] for record in found.records}
    assert errors == {good.case_id: None, bad.case_id: "ValueError: no such edit"}
    still = evaluate(editor, [good, bad], tmp_path, options=batched, **same)
    assert still.records == found.records  # what failed is not tried again unasked
    tried = evaluate(editor, [good, bad], tmp_path, options=replace(batched, retry_errors=True), **same)
    assert [record["error"] for record in tried.records] == [None] * 4
    assert tried.done_before == 2
    assert evaluate(editor, [good, bad], tmp_path, options=batched, **same).records == tried.records


@pytest.mark.slow
def test_scoring_in_other_processes_gives_the_same_records(editor: Any, tmp_path: Path) -> None:
    cases, arms = make_cases("detail", 2, size=64), [Arm("baseline"), Arm("on", editor.bridge, "random", 2.0)]
    found = [
        evaluate(
            editor,
            cases,
            tmp_path / str(workers),
            arms,
            perception=False,
            options=EvaluationOptions(workers=workers),
            **SHORT,
        )
        for workers in (0, 1)
    ]
    first, second = ([{**record, "seconds": 0} for record in run.records] for run in found)
    assert first == second
    assert all("right" in record["metrics"] for record in first)
