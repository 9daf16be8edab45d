"""Finished designs as arms of an evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.case import Case
from qwen_vision_bridge.evaluation.arms import Arm, Patch
from qwen_vision_bridge.injection import Site
from qwen_vision_bridge.io import digest_of
from qwen_vision_bridge.loading.towers import cast_weights
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

from .designs import Design


def arm_of(
    design: Design,
    seed: int,
    folder: Path,
    pipeline: EnhancedQwenImageEdit,
    site: Site = "tower",
    strength: float = 1.0,
) -> Arm:
    """The arm of a design at a seed; its name says all of these, as a part of a file name."""
    name = f"{design.name.replace('+', '-and-')}.{site}.{strength:g}.{seed}"
    if design.method == "sharp":
        return Arm(name, patch=sharp_images, patch_name="sharp images")
    place = design.place(folder, seed)
    if design.rival:
        return Arm(name, patch=_lora(place, pipeline), patch_name=f"LoRA {_digest(place)}")
    bridge = VisionBridge.from_pretrained(place).requires_grad_(False)
    return Arm(name, bridge, str(place), strength, site, design.features)


@contextmanager
def sharp_images(pipeline: EnhancedQwenImageEdit, _case: Case) -> Iterator[None]:
    """Show the target images as sharp as it takes them, not reduced as the pipeline does."""
    family = pipeline.family
    area = family.image_size**2
    pipeline.family = replace(family, editor=replace(family.editor, condition_area=area))
    try:
        yield
    finally:
        pipeline.family = family


def _lora(place: Path, pipeline: EnhancedQwenImageEdit) -> Patch:
    """Put a copy of the text encoder with an adapter in the place of the pipeline's own."""
    from peft import PeftModel

    own = pipeline.pipe.text_encoder
    adapted = PeftModel.from_pretrained(copy.deepcopy(own), place)
    encoder = cast_weights(adapted.base_model.model, own.dtype)

    @contextmanager
    def patch(pipeline: EnhancedQwenImageEdit, _case: Case) -> Iterator[None]:
        pipeline.pipe.text_encoder = encoder
        try:
            yield
        finally:
            pipeline.pipe.text_encoder = own

    return patch


def _digest(place: Path) -> str:
    return digest_of([list(path.read_bytes()) for path in sorted(place.glob("adapter_*"))])
