"""How large the edit pipelines of diffusers make their images: the one place that knows and sets it.

The Plus pipeline has module constants, read at call time, for the image that the vision tower sees (384²
px) and for the one that the VAE encodes (1024²). The first pipeline has an inline 1024·1024 and feeds one
image to both. Every side is rounded to 32 px, unless an editor of small images asks for less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from PIL import Image

from .loading.locks import model_lock, replaced
from .specs import EditorSpec

STOCK_AREA = 1024 * 1024  # px², the default of both pipelines' outputs
STOCK_STEP = 32  # px, to whose multiples they round


@contextmanager
def image_sizes(pipeline_class: type, editor: EditorSpec) -> Iterator[None]:
    """Set an edit pipeline's px² to the editor's own; None there leaves diffusers' value."""
    module = import_module(pipeline_class.__module__)
    changes: dict[str, Any] = {}
    if hasattr(module, "CONDITION_IMAGE_SIZE"):
        changes = {"CONDITION_IMAGE_SIZE": editor.condition_area, "VAE_IMAGE_SIZE": editor.vae_area}
    with model_lock:
        if editor.vae_area is not None:
            changes["calculate_dimensions"] = partial(_dimensions, module.calculate_dimensions, editor)
        with replaced(module, **{name: value for name, value in changes.items() if value is not None}):
            yield


def effective_sizes(pipeline_class: type, editor: EditorSpec) -> list[int]:
    """px² of the image that the tower sees and of the one that the VAE encodes, and the px they round to."""
    module = import_module(pipeline_class.__module__)
    with image_sizes(pipeline_class, editor):
        areas = (getattr(module, name, STOCK_AREA) for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"))
        return [*areas, editor.condition_step]


def _dimensions(stock: Callable[..., Any], editor: EditorSpec, area: int, ratio: float) -> Any:
    """diffusers' own `calculate_dimensions` with the editor's area for the stock one, and its rounding."""
    if area == editor.condition_area and editor.condition_step != STOCK_STEP:
        step = editor.condition_step
        return tuple(round(math.sqrt(side) / step) * step for side in (area * ratio, area / ratio))
    return stock(editor.vae_area if area == STOCK_AREA else area, ratio)


def condition_grids(
    pipeline_class: type, editor: EditorSpec, image_processor: Any, images: Sequence[Image.Image]
) -> tuple[tuple[int, int], ...]:
    """(gh, gw) of each image as the editor's target tower sees it, worked out as the pipeline does.

    Args:
        image_processor: that of the pipeline's processor, which resizes once more to whole tokens.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    px, size = image_processor.patch_size * image_processor.merge_size, image_processor.size
    grids = []
    for image in images:
        width, height = condition_size(pipeline_class, editor, image)
        height, width = smart_resize(height, width, px, size["shortest_edge"], size["longest_edge"])
        grids.append((height // px, width // px))
    return tuple(grids)


def condition_size(pipeline_class: type, editor: EditorSpec, image: Image.Image) -> tuple[int, int]:
    """(width, height) in px to which the pipeline resizes an image for its processor."""
    return _resized("CONDITION_IMAGE_SIZE", pipeline_class, editor, image)


def vae_size(pipeline_class: type, editor: EditorSpec, image: Image.Image) -> tuple[int, int]:
    """(width, height) in px at which the pipeline's VAE encodes a reference image."""
    return _resized("VAE_IMAGE_SIZE", pipeline_class, editor, image)


def _resized(constant: str, pipeline_class: type, editor: EditorSpec, image: Image.Image) -> tuple[int, int]:
    """(width, height) in px of an image at the area that a pipeline's module constant says."""
    module = import_module(pipeline_class.__module__)
    with image_sizes(pipeline_class, editor):
        area = getattr(module, constant, STOCK_AREA)
        width, height = module.calculate_dimensions(area, image.width / image.height)[:2]
    return int(width), int(height)


def takes_several(pipeline_class_name: str) -> bool:
    """Whether the pipeline takes several reference images in one edit."""
    return pipeline_class_name != "QwenImageEditPipeline"
