"""The flow-matching loss of an edit through the frozen transformer, with more weight on what is to change.

Method: Lipman et al. 2023 (arXiv 2210.02747), with times from a logit-normal (Esser et al. 2024, arXiv
2403.03206). Gradients reach the prompt's states, and through them the vision features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..patches import vae_size
from ..specs import EditorSpec
from .data import Sample
from .packs import Seen

TIMES = (0.4, 1.2)  # mean and spread of the logit of the time, 1 being noise
CHANGED = 3.0  # how much more a latent token counts that the edit changes
TOGETHER = 2**22  # px that the VAE encodes in one batch
MOVED = 0.2  # mean absolute change of a latent token, normalised, from which it counts as changed


class Flow:
    """A stock edit pipeline's VAE and transformer, frozen.

    Args:
        pipe: the pipeline. editor: the sizes of its images.
        checkpointing: trade time for memory in the transformer's blocks.
    """

    def __init__(self, pipe: Any, editor: EditorSpec, checkpointing: bool = False) -> None:
        self.pipe, self.editor = pipe, editor
        self.transformer = pipe.transformer.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.transformer.train()  # it acts there alone; these blocks have no dropout

    @torch.no_grad()
    def see(self, samples: Sequence[Sample]) -> list[Seen]:
        """The fields `references` and `after`, packed latents (n, 64), and `latents`, rows and columns."""
        before, shapes = self._latents([sample.image for sample in samples])
        after, _ = self._latents([sample.after for sample in samples], [sample.image for sample in samples])
        return [
            {"references": one, "after": other, "latents": list(shape)}
            for one, other, shape in zip(before, after, shapes, strict=True)
        ]

    def losses(
        self,
        references: Tensor,
        after: Tensor,
        states: Tensor,
        real: Tensor,
        shape: tuple[int, int],
        noise: Tensor,
        spread: Tensor,
    ) -> Tensor:
        """The weighted error of the predicted velocity, one number a sample, (B,).

        Args:
            references, after: (B, n, 64), latents of `shape` (rows, columns) of packed tokens.
            states: (B, L, D), what the transformer reads. real: (B, L), which of them are no padding.
            noise: (B, n, 64). spread: (B,), standard normal: they decide the times.
        """
        dtype = self.transformer.dtype
        after, references = after.float(), references.float()
        time = torch.sigmoid(TIMES[0] + TIMES[1] * spread)  # (B,)
        noisy = torch.lerp(after, noise, time[:, None, None])
        predicted = self.transformer(
            hidden_states=torch.cat([noisy, references], dim=1).to(dtype),
            encoder_hidden_states=(states * real[..., None]).to(dtype),
            encoder_hidden_states_mask=real,
            timestep=time.to(dtype),
            img_shapes=[[(1, *shape), (1, *shape)]] * len(after),
            return_dict=False,
        )[0][:, : after.shape[1]].float()
        errors = (predicted - (noise - after)).square().mean(-1)  # (B, n)
        weight = 1 + (CHANGED - 1) * ((after - references).abs().mean(-1) > MOVED).float()
        return (errors * weight).sum(1) / weight.sum(1)

    def _latents(
        self, images: Sequence[Any], like: Sequence[Any] | None = None
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Packed, normalised latents of each image at the size of itself or of another."""
        pipe = self.pipe
        sizes = [vae_size(type(pipe), self.editor, image) for image in like or images]
        found: list[Tensor | None] = [None] * len(sizes)
        shapes = [(0, 0)] * len(sizes)
        for width, height in sorted(set(sizes)):
            alike = [number for number, size in enumerate(sizes) if size == (width, height)]
            together = max(TOGETHER // (width * height), 1)
            for first in range(0, len(alike), together):
                part = alike[first : first + together]
                shown = [images[number] for number in part]
                pixels = pipe.image_processor.preprocess(shown, height, width)[:, :, None]  # (B, 3, 1, H, W)
                pixels = pixels.to(pipe.vae.device, pipe.vae.dtype)
                latents = pipe._encode_vae_image(image=pixels, generator=None)[:, :, 0]  # (B, 16, H/8, W/8)
                packed = pipe._pack_latents(latents, *latents.shape)
                for number, rows in zip(part, packed, strict=True):
                    found[number] = rows
                    shapes[number] = (latents.shape[2] // 2, latents.shape[3] // 2)
        return found, shapes
