"""Edits: the held-out cases through every arm's pipeline, made and measured by the library's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from qwen_vision_bridge.world import make_cases

SITES = ("tower", "deepstack", "prompt_embeds")  # every bridge is trained at the first

Record = dict[str, Any]


class Edits(NamedTuple):
    """Edits of one arm and seed that are made in one go."""

    split: str
    group: str
    count: int
    """Cases of the group."""
    steps: int
    """Of denoising."""
    batch: int
    """Edits that are denoised together."""
    site: str = "tower"
    part: int = 0
    """The cases are dealt out to parts; a shuffled arm sees the features of a case of its own part."""
    parts: int = 1

    def kept(self, folder: Path, arm: str, seed: int) -> Path:
        """Where their records are."""
        shown = arm if self.site == "tower" else f"{arm}-at-{self.site}"
        name = f"{self.group}-{shown}-seed{seed}-{self.part + 1}-of-{self.parts}.jsonl"
        return folder / "edited" / f"{self.split}-{self.count}" / name


def edit(bench: Bench, arm: str, seed: int, edits: Edits) -> list[Record]:
    """Records of one arm and seed: those that are kept, or of edits made now.

    Raises:
        RuntimeError: an edit failed; those that were made stay, and a second call tries it again.
    """
    kept = edits.kept(bench.folder, arm, seed)
    if not kept.is_file():
        keep_records(kept, _made(bench, arm, seed, edits))
    return read_records(kept)


def _made(bench: Bench, arm: str, seed: int, edits: Edits) -> Iterator[Record]:
    cases = make_cases(edits.group, edits.count, seed=7, split=edits.split)[edits.part :: edits.parts]
    design, chosen = EXTRA.get(arm), Arm(BASELINE)
    if design is not None and design.is_bridge:
        place = design.place(bench.folder, seed)
        bridge = VisionBridge.from_pretrained(place).requires_grad_(False)
        chosen = Arm(place.name.replace("+", "-and-"), bridge, str(place), 1.0, edits.site, design.features)
    folder = bench.folder / "edits" / edits.kept(bench.folder, arm, seed).stem
    by_id = {case.case_id: case for case in cases}
    with _other_model(bench, design, seed):
        own = design is None or design.is_bridge
        run = Run(
            bench.pipeline, folder, [chosen], 0, {"num_inference_steps": edits.steps}, by_id, edits.batch, own
        )
        worked = work_through(run, perception=False, measurer=bench.measurer, retry_errors=True)
    shown = arm if edits.site == "tower" else f"{arm} at {edits.site}"
    for record in worked.records:
        if record["error"]:
            raise RuntimeError(f"{record['case_id']}, {arm}: {record['error']}")
        yield {
            "arm": shown, "seed": seed, "group": record["group"], "difficulty": record["difficulty"],
            "kind": record["kind"], "case": record["case_id"], "metrics": record["metrics"],
            "level_weights": record.get("level_weights"),
        }  # fmt: skip


@contextmanager
def _other_model(bench: Bench, design: Design | None, seed: int) -> Iterator[None]:
    """The rival in the place of the text encoder, or pictures as sharp as the target takes them."""
    pipeline = bench.pipeline
    encoder, family = pipeline.pipe.text_encoder, pipeline.family
    try:
        if design is not None and design.rival:
            _, reader = bench.load(design, seed)
            pipeline.pipe.text_encoder = reader.model.to(encoder.dtype)
        elif design is not None and design.method == "sharp":
            side = family.picture_size
            pipeline.family = replace(family, editor=replace(family.editor, condition_area=side * side))
        yield
    finally:
        pipeline.pipe.text_encoder, pipeline.family = encoder, family
