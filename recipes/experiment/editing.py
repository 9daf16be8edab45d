"""Edits: the held-out cases through every arm's pipeline, by the library's evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import Bench
from designs import Design

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.arms import Arm
from qwen_vision_bridge.comparisons import BASELINE
from qwen_vision_bridge.evaluation import evaluate
from qwen_vision_bridge.world import GROUPS, make_cases

SITES = ("deepstack", "prompt_embeds")  # beside the tower's output, where every bridge is trained


def edit_all(
    bench: Bench, found: Sequence[tuple[Design, int, Path]], folder: Path, count: int, steps: int, batch: int
) -> list[dict[str, Any]]:
    """Records of edits of all arms and seeds; the first seed of `perceive` also at the other sites.

    Args:
        count: cases a group. steps: of denoising. batch: edits that are denoised together.
    """
    cases = [case for group in GROUPS[:3] for case in make_cases(group, count, seed=7)]
    arms, names = [Arm(BASELINE)], {BASELINE: (BASELINE, 0)}
    for design, seed, place in found:
        if design.rival:
            continue
        bridge = VisionBridge.from_pretrained(place).requires_grad_(False)
        for site in ("tower", *(SITES if design.name == "perceive" and seed == 0 else ())):
            shown = design.name if site == "tower" else f"{design.name} at {site}"
            name = f"{shown.replace(' ', '-').replace('+', '-and-')}-seed{seed}"
            arms.append(Arm(name, bridge, str(place), 1.0, site, design.features))
            names[name] = (shown, seed)
    evaluated = evaluate(
        bench.pipeline, cases, folder / "bridges", arms, perception=False, batch_arms=batch,
        workers=bench.workers, num_inference_steps=steps,
    )  # fmt: skip
    records = [_record(record, *names[record["arm"]]) for record in evaluated.records]
    for design, seed, place in found:
        if design.rival:
            records += _rival(bench, design, seed, place, cases, folder, steps, batch)
    return [record for record in records if record["metrics"]]


def _rival(
    bench: Bench, design: Design, seed: int, place: Path, cases: Sequence[Any], folder: Path, steps: int,
    batch: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rival in the pipeline's own text encoder, evaluated as that pipeline's baseline."""
    pipe = bench.pipeline.pipe
    kept = pipe.text_encoder
    _, reader = bench.load(design, place, seed)
    pipe.text_encoder = reader.model.to(kept.dtype)
    where = folder / f"lora-seed{seed}"
    try:
        evaluated = evaluate(
            bench.pipeline, cases, where, [Arm(BASELINE)], perception=False, reuse_baselines=False,
            batch_arms=batch, workers=bench.workers, num_inference_steps=steps,
        )  # fmt: skip
    finally:
        pipe.text_encoder = kept
    return [_record(record, design.name, seed) for record in evaluated.records]


def _record(record: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "group": record["group"], "difficulty": record["difficulty"],
        "case": record["case_id"], "metrics": record["metrics"],
        "level_weights": record.get("level_weights"),
    }  # fmt: skip
