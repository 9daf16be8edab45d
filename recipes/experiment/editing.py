"""Edits: the held-out cases through every arm's pipeline, made and measured by the library's evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asking import keep_records, read_records
from bench import Bench
from designs import EXTRA, Design

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.arms import Arm
from qwen_vision_bridge.comparisons import BASELINE
from qwen_vision_bridge.evaluation import work_through
from qwen_vision_bridge.jobs import Run
from qwen_vision_bridge.world import Case, make_cases

SITES = ("deepstack", "prompt_embeds")  # beside the tower's output, where every bridge is trained

Record = dict[str, Any]


class Edits(NamedTuple):
    """What is edited, and how."""

    split: str
    groups: tuple[str, ...]
    count: int
    """Cases a group."""
    steps: int
    """Of denoising."""
    batch: int
    """Edits that are denoised together."""
    parts: int = 1
    """The cases are dealt out to so many; a shuffled arm sees the features of a case of its own part."""

    @property
    def name(self) -> str:
        """Of the folder that its records are kept in."""
        return f"{self.split}-{self.count}"


def edit_part(bench: Bench, arms: Sequence[tuple[str, int]], edits: Edits, part: int) -> list[Record]:
    """Records of a part of the cases in all arms and seeds; `perceive` at seed 0 also at the other sites.

    Raises:
        RuntimeError: an edit failed; those that were made stay, and a second call tries it again.
    """
    kept = bench.folder / "edited" / edits.name / f"{part + 1}-of-{edits.parts}.jsonl"
    if kept.is_file():
        return read_records(kept)
    every = [c for group in edits.groups for c in make_cases(group, edits.count, seed=7, split=edits.split)]
    cases = every[part :: edits.parts]
    folder = bench.folder / "edits" / edits.name / f"{part + 1}-of-{edits.parts}"
    names, chosen = {BASELINE: (BASELINE, 0)}, [Arm(BASELINE)]
    for design, seed in ((EXTRA[arm], seed) for arm, seed in arms):
        if design.rival:
            continue
        place = design.place(bench.folder, seed)
        bridge = VisionBridge.from_pretrained(place).requires_grad_(False)
        for site in ("tower", *(SITES if design.name == "perceive" and seed == 0 else ())):
            shown = design.name if site == "tower" else f"{design.name} at {site}"
            name = f"{shown.replace(' ', '-').replace('+', '-and-')}-seed{seed}"
            chosen.append(Arm(name, bridge, str(place), 1.0, site, design.features))
            names[name] = (shown, seed)
    records = _worked(bench, cases, folder / "bridges", chosen, edits)
    found = [_record(record, *names[record["arm"]]) for record in records]
    for design, seed in ((EXTRA[arm], seed) for arm, seed in arms if EXTRA[arm].rival):
        found += _rival(bench, design, seed, cases, folder, edits)
    keep_records(kept, found)
    return found


def _worked(
    bench: Bench, cases: Sequence[Case], folder: Path, arms: Sequence[Arm], edits: Edits,
    reuse_baselines: bool = True,
) -> list[Record]:  # fmt: skip
    options = {"num_inference_steps": edits.steps}
    by_id = {case.case_id: case for case in cases}
    run = Run(bench.pipeline, folder, arms, 0, options, by_id, edits.batch, reuse_baselines)
    return work_through(run, perception=False, workers=bench.workers, retry_errors=True).records


def _rival(
    bench: Bench, design: Design, seed: int, cases: Sequence[Case], folder: Path, edits: Edits
) -> list[Record]:
    """The rival in the pipeline's own text encoder, edited as that pipeline's baseline."""
    pipe = bench.pipeline.pipe
    kept = pipe.text_encoder
    _, reader = bench.load(design, seed)
    pipe.text_encoder = reader.model.to(kept.dtype)
    try:
        where = folder / f"{design.name}-seed{seed}"
        records = _worked(bench, cases, where, [Arm(BASELINE)], edits, reuse_baselines=False)
    finally:
        pipe.text_encoder = kept
    return [_record(record, design.name, seed) for record in records]


def _record(record: Record, arm: str, seed: int) -> Record:
    """A record of the experiment, from one of the library's.

    Raises:
        RuntimeError: the edit failed.
    """
    if record["error"]:
        raise RuntimeError(f"{record['case_id']}, {arm}: {record['error']}")
    return {
        "arm": arm, "seed": seed, "group": record["group"], "difficulty": record["difficulty"],
        "kind": record["kind"], "case": record["case_id"], "metrics": record["metrics"],
        "level_weights": record.get("level_weights"),
    }  # fmt: skip
