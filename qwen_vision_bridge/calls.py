"""What an edit is asked with, checked before anything heavy is loaded, and what it gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .bridge import check_strength
from .images import load_images
from .patches import takes_several
from .specs import Family, check_seed

RESERVED = (
    "generator",
    "prompt_embeds",
    "negative_prompt_embeds",
    "latents",
    "image",
    "num_images_per_prompt",
)


class LevelAttention(NamedTuple):
    """Which level the bridge drew on, token by token."""

    weights: torch.Tensor
    """(N, L) on the CPU, summing to 1 over L; the images' tokens one after the other, each row by row."""
    grids: tuple[tuple[int, int], ...]
    """(gh, gw) of each image."""
    levels: tuple[str, ...]

    def maps(self) -> list[np.ndarray]:
        """One (gh, gw, L) array an image."""
        parts = self.weights.split([rows * columns for rows, columns in self.grids])
        return [part.reshape(*grid, -1).numpy() for part, grid in zip(parts, self.grids, strict=True)]


class Comparison(NamedTuple):
    """The same edit without and with the bridge."""

    baseline: Image.Image
    enhanced: Image.Image
    attention: LevelAttention


def check_call(
    family: Family,
    pipeline_name: str,
    image: Any,
    prompt: Any,
    strength: Any,
    seed: Any,
    options: dict[str, Any],
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Open the images of an edit and complete its options with the family's defaults.

    Raises:
        TypeError, ValueError, FileNotFoundError, OSError: every cheap refusal happens here.
    """
    check_prompt(prompt)
    check_strength(strength)
    check_seed(seed)
    check_steps(options.get("num_inference_steps", family.steps))
    if taken := sorted(set(options) & set(RESERVED)):
        raise ValueError(
            f"{', '.join(taken)} cannot be given: the pairing of baseline and enhanced sets them"
        )
    images = load_images(image, family.target.token_px)
    if len(images) > 1 and not takes_several(pipeline_name):
        raise ValueError(f"{pipeline_name} takes one image, got {len(images)}: use Qwen-Image-Edit-2509")
    defaults = {
        "num_inference_steps": family.steps,
        "true_cfg_scale": family.true_cfg_scale,
        "negative_prompt": family.negative_prompt,
    }
    return images, {**defaults, **options}


def check_prompt(prompt: Any) -> str:
    """A prompt with something in it.

    Raises:
        TypeError: no string. ValueError: empty or blank.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, not {type(prompt).__name__}")
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what to change")
    return prompt


def check_steps(steps: Any) -> int:
    """A number of denoising steps that the released scheduler can do.

    Raises:
        ValueError: less than 2; the scheduler stretches its steps to a fixed end and divides by zero for one.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"num_inference_steps is a whole number from 2, not {steps!r}")
    return steps
