"""Edits of held-out cases through every arm, drawn first, and measured by the library, now or later."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

from PIL import Image

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.edit import Edit
from qwen_vision_bridge.evaluation.arms import Arm, target_levels
from qwen_vision_bridge.evaluation.statistics import BASELINE
from qwen_vision_bridge.evaluation.tasks import Run
from qwen_vision_bridge.injection import LevelAttention
from qwen_vision_bridge.io import write_whole
from qwen_vision_bridge.loading.towers import cast_weights
from qwen_vision_bridge.synthetic.cases import Case, make_cases

from .asking import keep_records, read_records
from .bench import Bench
from .designs import EXTRA, Design

SITES = ("tower", "deepstack")  # every bridge is trained at the first
WEIGHTS = "level-weights.json"

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
    """Edits that are denoised together; 1 is the stock call."""
    site: str = "tower"
    part: int = 0
    """The cases are dealt out to parts; a shuffled arm sees the features of a case of its own part."""
    parts: int = 1

    def cases(self) -> list[Case]:
        """What is edited."""
        return make_cases(self.group, self.count, seed=7, split=self.split)[self.part :: self.parts]

    def drawn(self, folder: Path, arm: str, seed: int) -> Path:
        """Where their images are."""
        return folder / "drawn" / f"{self.split}-{self.count}" / f"{self._name(arm, seed)}.zip"

    def kept(self, folder: Path, arm: str, seed: int) -> Path:
        """Where their records are."""
        return folder / "edited" / f"{self.split}-{self.count}" / f"{self._name(arm, seed)}.jsonl"

    def _name(self, arm: str, seed: int) -> str:
        shown = arm if self.site == "tower" else f"{arm}-at-{self.site}"
        return f"{self.group}-{shown}-seed{seed}-{self.part + 1}-of-{self.parts}"


def draw(bench: Bench, arm: str, seed: int, edits: Edits) -> None:
    """Make the images of one arm and seed, unless they or their records are there."""
    place = edits.drawn(bench.folder, arm, seed)
    if not (place.is_file() or edits.kept(bench.folder, arm, seed).is_file()):
        write_whole(place, lambda path: _draw(bench, arm, seed, edits, path))


def measure(bench: Bench, arm: str, seed: int, edits: Edits) -> list[Record]:
    """Records of one arm and seed: those that are kept, or of drawn images measured now."""
    kept = edits.kept(bench.folder, arm, seed)
    if not kept.is_file():
        keep_records(kept, _measured(bench, arm, seed, edits))
    return read_records(kept)


def _draw(bench: Bench, arm: str, seed: int, edits: Edits, path: Path) -> None:
    cases, design, pipeline = edits.cases(), EXTRA.get(arm), bench.pipeline
    chosen = Arm(BASELINE)
    if design is not None and design.is_bridge:
        place = design.place(bench.folder, seed)
        bridge = VisionBridge.from_pretrained(place).requires_grad_(False)
        chosen = Arm(place.name.replace("+", "-and-"), bridge, str(place), 1.0, edits.site, design.features)
    options = {"num_inference_steps": edits.steps}
    run = Run(
        pipeline, path.parent, [chosen], 0, options, {case.case_id: case for case in cases}, edits.batch
    )
    weights: dict[str, dict[str, float]] = {}
    with _other_model(bench, design, seed), pipeline.keeping_source(), ZipFile(path, "w") as file:
        for first in range(0, len(cases), edits.batch):
            some = cases[first : first + edits.batch]
            if edits.batch == 1:
                made = [pipeline.edit(_request(run, some[0]))]
            else:
                prepared = [pipeline.prepare(_request(run, case)) for case in some]
                attentions = [one.attention for one in prepared]
                made = list(zip(pipeline.denoise(prepared), attentions, strict=True))
            for case, (image, attention) in zip(some, made, strict=True):
                file.writestr(f"{case.case_id}.webp", _lossless(image))
                if attention is not None:
                    weights[case.case_id] = _shares(attention)
        file.writestr(WEIGHTS, json.dumps(weights))


def _request(run: Run, case: Case) -> Edit:
    """The edit of a case, with the noise that an evaluation draws."""
    (arm,) = run.arms
    source: Any = None
    if arm.features == "target":
        source = target_levels(arm.bridge.config)
    elif arm.bridge is not None:
        shown = case.case_id if arm.features == "own" else run.partners[case.case_id]
        if shown is None:
            raise ValueError(f"{case.case_id}: no other image of its part has its grid; take fewer --parts")
        source = run.pipeline.extract_source(run.cases[shown].images)
    edit = run.pipeline.check_edit(case.image, case.prompt, run.seed_of(case), arm.strength, **run.options)
    return replace(edit, bridge=arm.bridge, source=source, site=arm.site)


def _measured(bench: Bench, arm: str, seed: int, edits: Edits) -> Iterator[Record]:
    shown = arm if edits.site == "tower" else f"{arm} at {edits.site}"
    with ZipFile(edits.drawn(bench.folder, arm, seed)) as file:
        weights = json.loads(file.read(WEIGHTS))
        waiting = []
        for case in edits.cases():
            image = Image.open(io.BytesIO(file.read(f"{case.case_id}.webp"))).convert("RGB")
            waiting.append((case, bench.scorer.submit(case, image)))
    for case, measured in waiting:
        yield {
            "arm": shown,
            "seed": seed,
            "group": case.group,
            "difficulty": case.difficulty,
            "kind": case.kind,
            "case": case.case_id,
            "metrics": measured.result()["metrics"],
            "level_weights": weights.get(case.case_id),
        }


def _lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return buffer.getvalue()


def _shares(attention: LevelAttention) -> dict[str, float]:
    """The mean weight of each level over an image."""
    maps = attention.maps()[-1]  # (gh, gw, L)
    means = maps.reshape(-1, maps.shape[-1]).mean(0).tolist()
    return dict(zip(attention.levels, means, strict=True))


@contextmanager
def _other_model(bench: Bench, design: Design | None, seed: int) -> Iterator[None]:
    """The rival in the place of the text encoder, or images as sharp as the target takes them."""
    pipeline = bench.pipeline
    encoder, family = pipeline.pipe.text_encoder, pipeline.family
    try:
        if design is not None and design.rival:
            _, reader = bench.load(design, seed)
            pipeline.pipe.text_encoder = cast_weights(reader.model, encoder.dtype)
        elif design is not None and design.method == "sharp":
            side = family.image_size
            pipeline.family = replace(family, editor=replace(family.editor, condition_area=side * side))
        yield
    finally:
        pipeline.pipe.text_encoder, pipeline.family = encoder, family
