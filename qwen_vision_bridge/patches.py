"""Corrections of a stock edit call: image sizes, positions, batched vision attention, shared latents.

The Plus pipeline has module constants, read at call time, for the image that the vision tower sees (384²
px) and for the one that the VAE encodes (1024²). The first pipeline has an inline 1024·1024 and feeds one
image to both. Every side is rounded to 32 px, unless an editor of small images asks for less.

Outside the `with`, and after any exception inside it, the pipeline is bit-identical to stock.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .loading.locks import model_lock, replaced
from .loading.token_grid import PixelLimits, token_grid
from .loading.tower_attention import VisionAttention, check_vision_attention, tower_attention
from .specs import STOCK_AREA, STOCK_STEP, EditorSpec, Family

if TYPE_CHECKING:
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
    from transformers import BaseImageProcessor

    EditPipeline: TypeAlias = QwenImageEditPipeline | QwenImageEditPlusPipeline

logger = logging.getLogger(__name__)

MAX_STRETCH = 0.05
PHOTO_SIDE, PHOTO_COLOURS = 128, 400  # px, and colours of 5 bits a channel
Mrope = Literal["fixed", "stock"]


_announced: set[str] = set()


@contextmanager
def patched(
    pipe: EditPipeline,
    editor: EditorSpec,
    mrope: Mrope = "fixed",
    vision_attention: VisionAttention = "batched",
) -> Iterator[None]:
    """Apply every correction that an edit needs; see `mrope_positions`, `batched_vision`, `image_sizes`."""
    positions, attention = mrope_positions(pipe, mrope), batched_vision(pipe, vision_attention)
    with model_lock, positions, attention, image_sizes(type(pipe), editor):
        yield


@contextmanager
def image_sizes(pipeline_class: type, editor: EditorSpec) -> Iterator[None]:
    """Set an edit pipeline's image areas to the editor's; None there leaves diffusers' value."""
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
    pipeline_class: type,
    editor: EditorSpec,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
) -> tuple[tuple[int, int], ...]:
    """(gh, gw) of each image as the editor's target tower sees it, worked out as the pipeline does.

    Args:
        image_processor: that of the pipeline's processor, which resizes once more to whole tokens.
    """
    px, size = image_processor.patch_size * image_processor.merge_size, image_processor.size
    limits = PixelLimits(size["shortest_edge"], size["longest_edge"])
    grids = []
    for image in images:
        width, height = condition_size(pipeline_class, editor, image)
        grids.append(token_grid(width, height, px, limits))
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


@contextmanager
def mrope_positions(pipe: EditPipeline, mode: Mrope = "fixed") -> Iterator[None]:
    """Pass the text encoder the token types from which it numbers image tokens along three axes.

    The edit pipelines of diffusers 0.42 drop the processor's `mm_token_type_ids`; transformers 5 then numbers
    image tokens along one axis, not the three the model was trained with (diffusers issue 14194). `fixed`
    adds them where they are missing, as the processor makes them; `stock` leaves the installed behaviour.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("fixed", "stock"):
        raise ValueError(f'mrope is "fixed" or "stock", not {mode!r}')
    if mode == "stock" or pipe.text_encoder is None:
        yield
        return
    config = pipe.text_encoder.config

    def add_token_types(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("image_grid_thw") is None or kwargs.get("mm_token_type_ids") is not None:
            return None
        _announce_once(
            "mrope", "image tokens get three-axis positions, which diffusers drops (mrope='stock' leaves it)"
        )
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return args, {**kwargs, "mm_token_type_ids": types}

    with model_lock:
        inner = pipe.text_encoder.model
        deltas = getattr(inner, "rope_deltas", None)
        handle = pipe.text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            inner.rope_deltas = deltas  # the encoder remembers the last prompt's offsets


@contextmanager
def batched_vision(pipe: EditPipeline, mode: VisionAttention = "batched") -> Iterator[None]:
    """Run the target tower's attention over all windows of one length at once instead of one by one.

    The results equal those of transformers' own loop up to rounding; `stock` leaves the loop.

    Raises:
        ValueError: an unknown mode.
    """
    if check_vision_attention(mode) == "stock" or pipe.text_encoder is None:
        yield
        return
    _announce_once(
        "attention", "vision towers attend in batches of windows (vision_attention='stock' leaves their loop)"
    )
    with tower_attention(pipe.text_encoder.model.visual, mode):
        yield


@contextmanager
def shared_latents(pipe: EditPipeline) -> Iterator[None]:
    """Encode every reference image once for all calls inside the `with`; the images stay bit-identical.

    The pipelines take the mode of the VAE's distribution, so an image's latents are a function of its
    pixels alone.
    """
    known: dict[tuple[object, ...], Tensor] = {}

    def encode(image: Tensor, generator: torch.Generator | None) -> Tensor:
        pixels = image.detach().cpu().contiguous()
        content = hashlib.sha256(pixels.view(torch.uint8).numpy()).hexdigest()
        key = (content, tuple(image.shape), image.dtype, image.device)
        if key not in known:
            known[key] = stock(image=image, generator=generator)
        return known[key]

    with model_lock:
        stock = pipe._encode_vae_image
        with replaced(pipe, _encode_vae_image=encode):
            yield


def warn_of_stretch(editor: EditorSpec, image: Image.Image) -> None:
    """Warn, once for a size, where rounding the output to 32 px changes an image's shape by over 5 %."""
    area, ratio = editor.vae_area or STOCK_AREA, image.width / image.height
    sides = (round(math.sqrt(side) / STOCK_STEP) * STOCK_STEP for side in (area * ratio, area / ratio))
    width, height = sides
    if abs(width / height / ratio - 1) > MAX_STRETCH:
        change = f"{image.width}×{image.height} px becomes {width}×{height} px"
        advice = "crop or pad it to a shape that the editor can do"
        _announce_once(change, f"{change}, which stretches the image: {advice}", logging.WARNING)


def looks_like_photograph(image: Image.Image) -> bool:
    """Whether an image has more colours than synthetic ones, by 5 bits a channel at 128 px: a heuristic.

    Images of the synthetic world have 322 at most, photographs in colour 470 or more; greys are not told.
    """
    small = image.convert("RGB")
    small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    shades = (np.asarray(small) >> 3).reshape(-1, 3)
    return len(np.unique(shades, axis=0)) > PHOTO_COLOURS


def photo_note(family: Family, images: Sequence[Image.Image]) -> str:
    """A clause where models that know their synthetic world alone are given a photograph; else ""."""
    if family.synthetic_only and any(map(looks_like_photograph, images)):
        return f"looks like a photograph, and {family.name} was trained on synthetic scenes only"
    return ""


def warn_of_photograph(family: Family, images: Sequence[Image.Image]) -> None:
    """Warn, once a process, where an edit shows a photograph to models that know their own world alone."""
    key = f"photograph:{family.name}"
    if key not in _announced and (note := photo_note(family, images)):
        _announce_once(key, f"an image {note}: expect little of its edits", logging.WARNING)


def _announce_once(key: str, message: str, level: int = logging.INFO) -> None:
    if key not in _announced:
        _announced.add(key)
        logger.log(level, message)
