"""Edits denoised together: the arms of a case, or cases of equal size, in one call of the stock pipeline.

The stock Plus pipeline takes one prompt at a time. Here its first half encodes prompts and draws latents edit
by edit, with whatever hooks are on; then its second half runs once for all of them. Both halves are stock
code. A batch is not bit-identical to single edits: matrix products of other shapes add up in another order,
and prompts of unequal length are padded and masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .injection import LevelAttention
from .loading.checks import not_finite
from .loading.locks import exclusive, replaced

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGE = 512 * 512  # px²; larger images are decoded one by one, since a batch would not fit beside the DiT

Prompt = tuple[torch.Tensor, torch.Tensor | None]  # (1, T, D), and (1, T) or None where every token is valid


class Prepared(NamedTuple):
    """One edit up to its denoising."""

    call: dict[str, Any]
    """Arguments of the stock call."""
    prompts: tuple[Prompt, ...]
    """The positive prompt, and the negative one where there is guidance."""
    latents: torch.Tensor
    """The noise, (1, S, C)."""
    references: torch.Tensor | None
    """Latents of the images, (1, R, C)."""
    attention: LevelAttention | None
    """The level weights where a bridge was in."""

    @property
    def shape(self) -> tuple[object, ...]:
        """What edits of one batch have in common: image sizes, steps, guidance."""
        images = self.call["image"]
        sizes = tuple(image.size for image in (images if isinstance(images, list) else [images]))
        own = ("image", "prompt", "generator")
        shared = {name: value for name, value in self.call.items() if name not in own}
        return sizes, len(self.prompts), repr(sorted(shared.items()))


class _ReadyToDenoise(Exception):  # noqa: N818 - it ends a call half way and is no error
    """Raised where the stock pipeline has everything that denoising starts from."""


@exclusive
def prepare(pipe: DiffusionPipeline, **call: Any) -> Prepared:
    """Run the stock pipeline up to its denoising.

    Args:
        pipe: a Qwen-Image-Edit pipeline, with the hooks of the edit on.
        call: arguments of its call: one `image` or several, one `prompt`, a `generator` and options.
    """
    prompts: list[Prompt] = []
    drawn: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    encode, draw = pipe.encode_prompt, pipe.prepare_latents

    def keep_prompt(*args: object, **kwargs: object) -> Prompt:
        prompts.append(encode(*args, **kwargs))
        return prompts[-1]

    def keep_latents(*args: object, **kwargs: object) -> None:
        drawn.append(draw(*args, **kwargs))
        raise _ReadyToDenoise

    halted = suppress(_ReadyToDenoise)
    with replaced(pipe, encode_prompt=keep_prompt, prepare_latents=keep_latents), halted:
        pipe(**call)
    latents, references = drawn[0]
    return Prepared(call, tuple(prompts), latents, references, None)


@exclusive
def denoise(pipe: DiffusionPipeline, edits: Sequence[Prepared]) -> list[Image.Image]:
    """Run the stock pipeline from its denoising on, once for all edits.

    Returns:
        One image an edit, in order.

    Raises:
        ValueError: no edits, or edits that differ in sizes, steps or guidance.
    """
    if len({edit.shape for edit in edits}) != 1:
        raise ValueError("edits of a batch need images of the same sizes and the same options")
    first = edits[0]
    prompts = iter([_padded([edit.prompts[turn] for edit in edits]) for turn in range(len(first.prompts))])
    latents = torch.cat([edit.latents for edit in edits])  # (B, S, C)
    references = None
    if first.references is not None:
        references = torch.cat([edit.references for edit in edits])  # (B, R, C)
    images = first.call["image"]
    width, height = (images[-1] if isinstance(images, list) else images).size
    sliced = pipe.vae.use_slicing or width * height > LARGE

    def next_prompt(*_: object, **__: object) -> Prompt:
        return next(prompts)

    def all_latents(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        return latents, references

    stock_parts = replaced(pipe, encode_prompt=next_prompt, prepare_latents=all_latents)
    with stock_parts, replaced(pipe.vae, use_slicing=sliced):
        return run_stock(pipe, **first.call)


def run_stock(pipe: DiffusionPipeline, **call: Any) -> list[Image.Image]:
    """Run the stock call and return its images, unless a NaN would have turned them black.

    Raises:
        ValueError: pixels or latents that are not finite; the message names the broken weight.
    """
    as_images = call.get("output_type", "pil") == "pil"
    outputs = pipe(**{**call, "output_type": "np"} if as_images else call).images
    values = outputs if isinstance(outputs, torch.Tensor) else torch.from_numpy(np.asarray(outputs))
    if not torch.isfinite(values).all():
        models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        raise not_finite("the pixels of the edit", models)
    return list(pipe.image_processor.numpy_to_pil(outputs) if as_images else outputs)


def _padded(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of one batch: (B, T, D) with zeros behind the shorter ones, and (B, T) bool or None."""
    longest = max(embeds.shape[1] for embeds, _ in prompts)
    rows, masks = [], []
    for embeds, mask in prompts:
        missing = longest - embeds.shape[1]
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        valid = valid if mask is None else mask.bool()
        rows.append(torch.nn.functional.pad(embeds, (0, 0, 0, missing)))
        masks.append(torch.nn.functional.pad(valid, (0, missing)))
    whole = torch.cat(masks)
    return torch.cat(rows), None if bool(whole.all()) else whole
