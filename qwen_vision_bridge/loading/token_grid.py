"""Token grids that Qwen's image processors give images, without importing transformers where it can be.

A folder's processor config states the limits from which the grid follows. transformers and torchvision, which
take seconds to import, are needed only where it does not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..io import read_json
from ..specs import ModelSpec
from .checkpoints import locate
from .towers import load_processor

MAX_RATIO = 200  # of an image's sides
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast")


class PixelLimits(NamedTuple):
    """Areas between which a processor resizes an image, in px²."""

    smallest: int
    largest: int


def token_grid(width: int, height: int, px: int, limits: PixelLimits) -> tuple[int, int]:
    """(gh, gw) of an image's merged tokens.

    The arithmetic is `smart_resize` of transformers.models.qwen2_vl.image_processing_qwen2_vl.

    Args:
        px: of one merged token's side.

    Raises:
        ValueError: one side is over 200 times the other.
    """
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_RATIO:
        raise ValueError(f"one side is {ratio:.0f} times the other, {MAX_RATIO} is the most: crop the image")
    rows, columns = round(height / px), round(width / px)
    if rows * columns * px**2 > limits.largest:
        scale = math.sqrt(height * width / limits.largest)
        return max(1, math.floor(height / scale / px)), max(1, math.floor(width / scale / px))
    if rows * columns * px**2 < limits.smallest:
        scale = math.sqrt(limits.smallest / (height * width))
        return math.ceil(height * scale / px), math.ceil(width * scale / px)
    return rows, columns


def pixel_limits(spec: ModelSpec) -> PixelLimits:
    """The limits of a model's own processor: read from its folder's config, or asked of the processor.

    Raises:
        OSError: the folder has no processor, or the hub cannot be reached.
    """
    limits = stated_limits(Path(locate(spec.repo)).expanduser() / spec.processor_subfolder)
    if limits is None:
        size = load_processor(spec.repo, spec.processor_subfolder, spec.revision).size
        limits = PixelLimits(size["shortest_edge"], size["longest_edge"])
    return limits


def stated_limits(folder: Path) -> PixelLimits | None:
    """The limits that a folder's config states in full; None where only the processor can tell."""
    try:  # transformers prefers the first
        settings: Any = read_json(folder / "processor_config.json").get("image_processor")
    except (OSError, ValueError):
        settings = None
    if settings is None:
        try:
            settings = read_json(folder / "preprocessor_config.json")
        except (OSError, ValueError):
            return None
    if not isinstance(settings, dict) or settings.get("image_processor_type") not in PROCESSORS:
        return None
    size = settings.get("size")
    stated = size if isinstance(size, dict) else {}
    smallest = settings.get("min_pixels") or stated.get("shortest_edge")
    largest = settings.get("max_pixels") or stated.get("longest_edge")
    return PixelLimits(smallest, largest) if isinstance(smallest, int) and isinstance(largest, int) else None
