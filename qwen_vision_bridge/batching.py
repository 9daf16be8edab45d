"""Edits denoised together: the arms of a case, or cases of equal size, in one call of the stock pipeline.

The stock Plus pipeline takes one prompt at a time. Here its own first half makes prompts, noise and reference
latents of each edit, one by one and with whatever hooks are on; then its second half runs once for all of
them. Nothing of it is written anew, so both halves are the stock ones bit for bit. What is not bit for bit is
the arithmetic of a batch: matrix products of other shapes add up in another order, and prompts of unequal
length are padded and masked. Edits made together are close to those made alone, never the same by contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .injection import LevelAttention
from .loading.checks import not_finite
from .loading.locks import exclusive, replaced

LARGE = 512 * 512  # px²: images above it are decoded one by one, since a batch would not fit beside the DiT

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
    def shape(self) -> tuple[Any, ...]:
        """What edits of one batch have in common: sizes of the images, steps, guidance."""
        images = self.call["image"]
        sizes = tuple(image.size for image in (images if isinstance(images, list) else [images]))
        kept = {
            name: value for name, value in self.call.items() if name not in ("image", "prompt", "generator")
        }
        return sizes, len(self.prompts), repr(sorted(kept.items()))


class _ReadyToDenoise(Exception):  # noqa: N818 - it ends a call half way and is no error
    """The stock pipeline has made everything that denoising starts from."""


@exclusive
def prepare(pipe: Any, **call: Any) -> Prepared:
    """Run the stock pipeline up to its denoising.

    Args:
        pipe: a Qwen-Image-Edit pipeline of diffusers, with the hooks of the edit on.
        call: arguments of its call: one `image` or several, one `prompt`, a `generator` and options.
    """
    prompts: list[Prompt] = []
    made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    encode, draw = pipe.encode_prompt, pipe.prepare_latents

    def keep_prompt(*args: Any, **kwargs: Any) -> Prompt:
        prompts.append(encode(*args, **kwargs))
        return prompts[-1]

    def keep_latents(*args: Any, **kwargs: Any) -> None:
        made.append(draw(*args, **kwargs))
        raise _ReadyToDenoise

    halted = suppress(_ReadyToDenoise)
    with replaced(pipe, encode_prompt=keep_prompt, prepare_latents=keep_latents), halted:
        pipe(**call)
    latents, references = made[0]
    return Prepared(call, tuple(prompts), latents, references, None)


@exclusive
def denoise(pipe: Any, edits: Sequence[Prepared]) -> list[Image.Image]:
    """Run the stock pipeline from its denoising on, once for all edits.

    Returns:
        An image an edit, in their order.

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
    made: dict[str, Callable[..., Any]] = {
        "encode_prompt": lambda *_, **__: next(prompts),
        "prepare_latents": lambda *_, **__: (latents, references),
    }
    images = first.call["image"]
    width, height = (images[-1] if isinstance(images, list) else images).size
    sliced = pipe.vae.use_slicing or width * height > LARGE
    with replaced(pipe, **made), replaced(pipe.vae, use_slicing=sliced):
        return run_stock(pipe, **first.call)


def run_stock(pipe: Any, **call: Any) -> list[Any]:
    """The images of a stock call, the same bits, refused where a NaN would have turned them black.

    Raises:
        ValueError: pixels or latents that are not finite; it names the broken weight.
    """
    as_images = call.get("output_type", "pil") == "pil"
    made = pipe(**{**call, "output_type": "np"} if as_images else call).images
    values = made if isinstance(made, torch.Tensor) else torch.from_numpy(np.asarray(made))
    if not torch.isfinite(values).all():
        models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        raise not_finite("the pixels of the edit", models)
    return list(pipe.image_processor.numpy_to_pil(made) if as_images else made)


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
