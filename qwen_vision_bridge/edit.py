"""One edit with its arguments checked before any model is loaded, and what it results in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from .bridge import VisionBridge, check_strength
from .cache import VisionCache
from .images import ImageLike, load_images
from .injection import LevelAttention, Levels, Site
from .patches import takes_several
from .specs import Family, check_seed

PAIRED = ("generator", "prompt_embeds", "negative_prompt_embeds", "latents", "image", "num_images_per_prompt")
"""Arguments of the stock call that pair baseline and enhanced: users cannot set them."""


@dataclass(frozen=True)
class Edit:
    """One edit, ready to run."""

    images: list[Image.Image]
    prompt: str
    seed: int
    options: Mapping[str, Any]
    """Arguments of the stock call, the family's defaults included."""
    bridge: VisionBridge | None = None
    """None is the baseline."""
    source: VisionCache | Levels | None = None
    """What the bridge sees; None extracts the source's levels of `images`."""
    strength: float = 1.0
    site: Site = "tower"


class EditResult(NamedTuple):
    """An edited image, and the bridge's attention over the levels where there was a bridge."""

    image: Image.Image
    attention: LevelAttention | None


class Comparison(NamedTuple):
    """The same edit without and with the bridge."""

    baseline: Image.Image
    enhanced: Image.Image
    attention: LevelAttention


def check_edit(
    family: Family,
    pipeline_name: str,
    image: ImageLike | Sequence[ImageLike],
    prompt: str,
    seed: int,
    options: Mapping[str, Any],
    strength: float = 1.0,
) -> Edit:
    """Open an edit's images, check its arguments and complete its options with the family's defaults.

    Args:
        pipeline_name: class of the stock pipeline; the first edit pipeline takes one image only.

    Returns:
        The baseline's edit.

    Raises:
        TypeError, ValueError, FileNotFoundError, OSError: every refusal that needs no model.
    """
    check_prompt(prompt)
    check_strength(strength)
    check_seed(seed)
    check_steps(options.get("num_inference_steps", family.steps))
    if paired := sorted(set(options) & set(PAIRED)):
        raise ValueError(f"{', '.join(paired)} cannot be set: the pairing of baseline and enhanced does")
    images = load_images(image, family.target.token_px)
    if len(images) > 1 and not takes_several(pipeline_name):
        raise ValueError(f"{pipeline_name} takes one image, got {len(images)}: use Qwen-Image-Edit-2509")
    defaults = {
        "num_inference_steps": family.steps,
        "true_cfg_scale": family.true_cfg_scale,
        "negative_prompt": family.negative_prompt,
    }
    return Edit(images, prompt, seed, {**defaults, **options}, strength=strength)


def check_prompt(prompt: object) -> str:
    """Check that a prompt says something.

    Raises:
        TypeError: not a string. ValueError: empty or blank.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, not {type(prompt).__name__}")
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what to change")
    return prompt


def check_steps(steps: object) -> int:
    """Check a number of denoising steps against what the released scheduler can do.

    Raises:
        ValueError: less than 2; the scheduler stretches its steps to a fixed end and divides by zero for one.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"num_inference_steps is a whole number from 2, not {steps!r}")
    return steps
