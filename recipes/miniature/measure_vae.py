"""Reconstruction error of the miniature's VAE, and saving it in stock layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import build as miniature
from .single_frame import as_images

RESAMPLES = 2000


def to_range(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → [-1, 1] (B, 3, 1, H, W)."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


@torch.no_grad()
def in_batches(call: Callable[[Tensor], Tensor], images: Tensor, batch: int = 32) -> Tensor:
    """`call` on images as [-1, 1] (B, 3, 1, H, W), batch by batch, along the first dimension."""
    return torch.cat([call(to_range(part)) for part in images.split(batch)])


def encode(vae: nn.Module, x: Tensor) -> Tensor:
    """The latents that the pipeline takes: the posterior's mode, (B, C, 1, h, w)."""
    return vae.encode(x).latent_dist.mode()


def psnr_of(vae: nn.Module, images: Tensor) -> np.ndarray:
    """PSNR of each image's reconstruction from its mode, dB (B,); `images` as `to_range` takes them."""

    def errors(x: Tensor) -> Tensor:
        return (vae.decode(encode(vae, x)).sample - x).square().flatten(1).mean(1)

    errors_of_all = in_batches(errors, images).double().clamp(min=1e-10)
    return (10 * torch.log10(4 / errors_of_all)).cpu().numpy()


def finish(vae: nn.Module, some: Tensor, held_out: Tensor, output: Path, seed: int) -> list[dict[str, Any]]:
    """Put the latents' statistics in the config, save in stock layout, load with stock code, measure.

    Args:
        some: images to take the statistics from, as `held_out` uint8 (B, H, W, 3) on the VAE's device.

    Returns:
        Rows of results.
    """
    from diffusers import AutoencoderKLQwenImage

    with as_images(vae):
        trained = psnr_of(vae, held_out)
        latents = in_batches(partial(encode, vae), some).double().transpose(0, 1).flatten(1)  # (C, N·h·w)
    mean, std = ([round(v, 5) for v in values.tolist()] for values in (latents.mean(1), latents.std(1)))
    print(f"latents' mean {mean}\nlatents' std {std}", flush=True)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    miniature.save_weights(copy.deepcopy(vae).cpu(), output)
    shipped = AutoencoderKLQwenImage.from_pretrained(output, torch_dtype=torch.float32)
    saved = psnr_of(shipped.to(held_out.device).eval(), held_out)
    return [
        measured("PSNR of the averaged weights, dB", trained, np.mean, seed),
        measured("PSNR as shipped (bf16 on disk, stock code in fp32), dB", saved, np.mean, seed),
        measured("PSNR as shipped, worst percentile, dB", saved, worst_percentile, seed),
        {"name": "latents_mean", "value": mean, "n": len(some)},
        {"name": "latents_std", "value": std, "n": len(some)},
    ]


def worst_percentile(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The first percentile."""
    return np.percentile(values, 1, axis=axis)


def measured(name: str, values: np.ndarray, statistic: Callable[..., Any], seed: int) -> dict[str, Any]:
    """A statistic of values (n,) with its 95 % percentile bootstrap interval, printed."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(statistic(values[picks], axis=1), (2.5, 97.5))
    row = {"name": name, "value": float(statistic(values)), "n": len(values)}
    print(f"{name}: {row['value']:.2f} [{low:.2f}, {high:.2f}], n = {len(values)}", flush=True)
    return {**row, "ci_low": float(low), "ci_high": float(high)}
