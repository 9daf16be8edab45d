"""Batched version of the stock edit pipeline for the miniature.

It is for training only; figures come from the stock pipeline. `tests/recipes/test_miniature.py` proves that
both give the same image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import build as miniature
from . import tokenizer as tokens
from .data import PROMPT_TOKENS, closing, encode, opening
from .fast import FastModel, compile_modules

SIDE = 16  # tokens a side of a packed latent
TOKENS = SIDE * SIDE  # of an image
CUT = tokens.TEMPLATE_PREFIX_TOKENS


class Editor(nn.Module):
    """Frozen target and VAE with the trained transformer, for images of 128² px."""

    def __init__(self, target: FastModel, vae: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.target, self.vae, self.transformer = target.eval(), vae.eval(), transformer
        for frozen in (target, vae):
            frozen.requires_grad_(False)
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        nothing = torch.tensor([*encode(" "), *closing()])
        self.register_buffer("nothing", nothing, persistent=False)

    def compile_blocks(self, on: bool) -> None:
        """Turn torch.compile of the transformer's blocks on or off; they share one compilation."""
        compile_modules(self.transformer.transformer_blocks, on)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Packed, normalised latents (B, 256, 32) of uint8 images (B, 128, 128, 3)."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        z = self.vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0].float()
        return pack((z - self.latents_mean) / self.latents_std)

    def references(self, images: Tensor) -> Tensor:
        """Packed latents (B, shown·256, 32) of all images of each prompt, uint8 (B, shown, 128, 128, 3)."""
        latents = self.to_latents(images.flatten(0, 1))
        return latents.reshape(len(images), -1, latents.shape[-1])

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """The inverse, uint8."""
        batch, _, width = latents.shape
        z = latents.float().view(batch, SIDE, SIDE, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        z = z.reshape(batch, width // 4, 2 * SIDE, 2 * SIDE) * self.latents_std + self.latents_mean
        x = self.vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0].float()
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def embed(self, small: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """States that the transformer reads: of images with prompts, and of the same images with none.

        Args:
            small: (B, shown, 32, 32, 3) uint8.
            text: (B, P) ids, prompt and template's end.

        Returns:
            (B, T, D) with the padding still in it, and its tail (B, Q, D) for the empty negative prompt.
        """
        cut = len(opening(small.shape[1])[0])
        with_prompt = self.target.hidden(small, text)[:, CUT:]
        without = self.target.hidden(small, self.nothing.expand(len(small), -1))[:, cut:]
        return with_prompt, without

    def conditions(
        self, states: Tensor, empty: Tensor, length: Tensor, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, D) and their mask (B, T); where `dropped` (B,), those without a prompt.

        Args:
            length: (B,) tokens of prompt and template's end.
        """
        _batch, total, _ = states.shape
        seen = total - PROMPT_TOKENS
        places = torch.arange(total, device=states.device)
        real = places[None] < seen + length[:, None]
        if dropped is not None:
            without = torch.cat([states[:, :seen], empty], dim=1)
            without = nn.functional.pad(without, (0, 0, 0, total - without.shape[1]))
            states = torch.where(dropped[:, None, None], without, states)
            real = torch.where(dropped[:, None], places[None] < seen + empty.shape[1], real)
        return states * real[..., None], real

    def velocity(
        self, noisy: Tensor, references: Tensor, states: Tensor, real: Tensor, time: Tensor
    ) -> Tensor:
        """Predicted velocity (B, 256, 32) at time 1 (noise) to 0, for references (B, shown·256, 32)."""
        batch, length, _ = noisy.shape
        shapes = [[(1, SIDE, SIDE)] * (1 + references.shape[1] // length)] * batch
        out = self.transformer(
            hidden_states=torch.cat([noisy, references.to(noisy.dtype)], dim=1),
            encoder_hidden_states=states.to(noisy.dtype),
            encoder_hidden_states_mask=real,
            timestep=time,
            img_shapes=shapes,
            return_dict=False,
        )[0]
        return out[:, :length]

    @torch.no_grad()
    def sample(
        self,
        references: Tensor,
        states: Tensor,
        empty: Tensor,
        length: Tensor,
        steps: int,
        scale: float,
        seeds: Sequence[int],
    ) -> Tensor:
        """Edited latents (B, 256, 32) by the stock scheduler with the stock pipeline's guidance.

        Each row starts from the noise that the pipeline draws for its seed.
        """
        shape = (1, references.shape[-1] // 4, 2 * SIDE, 2 * SIDE)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = pack(torch.cat(noise)).to(states.device)
        yes = torch.ones(len(states), dtype=torch.bool, device=states.device)
        asked, empty_prompt = (self.conditions(states, empty, length, d) for d in (~yes, yes))
        scheduler = _scheduler(steps)
        for t in scheduler.timesteps:
            time = (t / 1000).to(x.device).expand(len(x))
            v = self.velocity(x, references, *asked, time).float()
            if scale > 1:
                against = self.velocity(x, references, *empty_prompt, time).float()
                guided = against + scale * (v - against)
                v = guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x


@contextmanager
def fast_transformer() -> Iterator[None]:
    """Remove what CUDA graphs and compilers do not support from the stock transformer.

    The search for each prompt's length, whose result is unused and which moves a number to the device in
    every call, is skipped; rotations by complex numbers become pairs of real ones.
    """
    from diffusers.models.transformers import transformer_qwenimage as stock

    kept = stock.compute_text_seq_len_from_mask, stock.apply_rotary_emb_qwen, stock.QwenEmbedRope.forward

    def in_pairs(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.view_as_real(angles) for angles in kept[2](*args, **kwargs))

    stock.compute_text_seq_len_from_mask = lambda states, mask: (states.shape[1], None, mask)
    stock.apply_rotary_emb_qwen = _rotate_pairs
    stock.QwenEmbedRope.forward = in_pairs
    try:
        yield
    finally:
        (stock.compute_text_seq_len_from_mask, stock.apply_rotary_emb_qwen, stock.QwenEmbedRope.forward) = (
            kept
        )


def _rotate_pairs(x: Tensor, angles: Tensor, use_real: bool = False) -> Tensor:
    """Neighbouring channels of x (B, S, H, D) as complex numbers times those of `angles` (S, D / 2, 2)."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[:, None].unbind(-1)  # (S, 1, D / 2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3).type_as(x)


def pack(latents: Tensor) -> Tensor:
    """Four neighbours as one token: (B, C, 32, 32) to (B, 256, 4·C)."""
    batch, channels = latents.shape[:2]
    z = latents.view(batch, channels, SIDE, 2, SIDE, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(batch, TOKENS, 4 * channels)


def _scheduler(steps: int) -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

    settings = miniature.SCHEDULER
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(TOKENS, *(settings[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def build_transformer(seed: int, folder: Path | str | None = None) -> nn.Module:
    """The transformer in fp32, random from a seed or from a stock folder.

    Its last layer and all modulation start at zero, as is usual for such models, so that every block starts
    as the identity.
    """
    from diffusers import QwenImageTransformer2DModel

    if folder:
        return QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    model = miniature.randomise(QwenImageTransformer2DModel(**miniature.TRANSFORMER).float(), seed)
    last = [model.proj_out, model.norm_out.linear]
    mods = [part[-1] for block in model.transformer_blocks for part in (block.img_mod, block.txt_mod)]
    with torch.no_grad():
        for layer in (*last, *mods):
            layer.weight.zero_()
            layer.bias.zero_()
    return model
