"""The few-step student starts as the teacher, learns, and its file loads like any LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vision_bridge.evaluation.metrics.registry import METRICS
from qwen_vision_bridge.loading.checkpoints import locate
from qwen_vision_bridge.loading.editors import few_step_scheduler
from qwen_vision_bridge.loading.loras import LoraSet
from recipes.miniature.data import edit_pairs
from recipes.miniature.measure_few_steps import rows_of
from recipes.miniature.train_dit import load
from recipes.miniature.train_few_steps import add_lora, answer, loss, save_lora, sigmas_of

RANK = 2


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The editor with a fresh LoRA, its frozen teacher, and one batch."""
    folder = locate("builtin:editor")
    editor = load(f"{folder}/text_encoder", f"{folder}/vae", f"{folder}/transformer", 0)
    teacher = copy.deepcopy(editor.transformer).eval().requires_grad_(False)
    torch.manual_seed(0)
    add_lora(editor.transformer, RANK)
    batch = {name: torch.from_numpy(rows) for name, rows in edit_pairs("train", 0, 2).items()}
    return editor, teacher, batch


def test_the_schedule_is_that_of_the_few_step_pipeline() -> None:
    assert sigmas_of(few_step_scheduler(), 4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_a_fresh_student_is_its_teacher_and_learns(parts: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Without guidance and in the same steps there is nothing to learn; of the teacher's steps there is."""
    editor, teacher, batch = parts
    sigmas = sigmas_of(few_step_scheduler(), 2)
    same = answer(editor, teacher, batch, sigmas, scale=1.0)
    with torch.no_grad():
        assert float(loss(editor, sigmas, same)["loss"]) < 1e-8
    wanted = answer(editor, teacher, batch, sigmas_of(few_step_scheduler(), 4), scale=4.0)
    trained = [parameter for parameter in editor.transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        value = loss(editor, sigmas, wanted)["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    save_lora(editor.transformer, RANK, tmp_path / "few.safetensors")
    pipe = type("Pipe", (), {"transformer": teacher, "text_encoder": None, "hf_device_map": None})()
    pipe.components, pipe._execution_device = {}, torch.device("cpu")
    pipe.maybe_free_model_hooks = lambda: None
    loras = LoraSet(pipe)
    name = loras.load(tmp_path / "few.safetensors")
    kept = teacher.transformer_blocks[0].attn.to_q.lora_B[name].weight
    made = editor.transformer.transformer_blocks[0].attn.to_q.lora_B["default"].weight
    assert torch.allclose(kept, made, atol=1e-3)
    assert kept.abs().max() > 1e-3


def test_rows_compare_a_setting_with_what_it_stands_beside() -> None:
    def record(case: int, arm: str, right: float) -> dict[str, Any]:
        facts = {"group": "space", "kind": "striped", "difficulty": "hard", "level": "edit", "error": None}
        return {**facts, "case_id": str(case), "arm": arm, "metrics": {"right": right}}

    records = []
    for case in range(20):
        records += [record(case, "20-steps", 1.0), record(case, "4-steps", float(case < 10))]
        records += [record(case, "4-steps-bridge", float(case < 15))]
    rows = {row["setting"]: row for row in rows_of(records)}
    assert METRICS["right"].is_share
    assert (rows["4-steps"]["right"], rows["4-steps"]["difference"]) == (0.5, -0.5)
    assert rows["20-steps"]["difference"] == 0
    assert (rows["4-steps-bridge"]["beside"], rows["4-steps-bridge"]["difference"]) == ("4-steps", 0.25)
    assert rows["4-steps-bridge"]["n"] == 20
    assert rows["4-steps-bridge"]["ci_low"] > 0
