"""Flow-matching loss of an edit through the frozen transformer, with more weight on what the edit changes.

Method: Lipman et al. 2023 (arXiv 2210.02747), with times from a logit-normal (Esser et al. 2024, arXiv
2403.03206). Gradients reach the prompt's states, and through them the vision features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..patches import vae_size
from ..specs import EditorSpec
from .data import Sample
from .packs import Fields

if TYPE_CHECKING:
    from diffusers import QwenImageEditPlusPipeline

TIMES = (0.4, 1.2)  # mean and standard deviation of the logit of the time; time 1 is noise
CHANGED = 3.0  # weight of a latent token that the edit changes
VAE_BATCH = 2**22  # px
THRESHOLD = 0.2  # mean absolute change of a normalised latent token from which it counts as changed


class FlowMatching:
    """The frozen VAE and transformer of a stock edit pipeline.

    Args:
        editor: decides the sizes of the images.
        checkpointing: recompute activations of the transformer's blocks.
    """

    def __init__(
        self, pipe: QwenImageEditPlusPipeline, editor: EditorSpec, checkpointing: bool = False
    ) -> None:
        self.pipe, self.editor = pipe, editor
        self.transformer = pipe.transformer.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.transformer.train()  # checkpointing acts in training mode only; these blocks have no dropout

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> list[Fields]:
        """The fields `references` and `after`, packed latents (n, 64), and `latents`, rows and columns."""
        images = [sample.image for sample in samples]
        before, shapes = self._latents(images, images)
        after, _ = self._latents([sample.after for sample in samples if sample.after is not None], images)
        return [
            {"references": one, "after": other, "latents": list(shape)}
            for one, other, shape in zip(before, after, shapes, strict=True)
        ]

    def losses(
        self,
        references: Tensor,
        after: Tensor,
        states: Tensor,
        mask: Tensor,
        shape: tuple[int, int],
        noise: Tensor,
        time_noise: Tensor,
    ) -> Tensor:
        """The weighted error of the predicted velocity, one number a sample, (B,).

        Args:
            references, after: (B, n, 64), latents of `shape` (rows, columns) of packed tokens.
            states: (B, L, D) of the prompt. mask: (B, L), False at padding.
            noise: (B, n, 64). time_noise: (B,), standard normal; decides the times.
        """
        dtype = self.transformer.dtype
        after, references = after.float(), references.float()
        time = torch.sigmoid(TIMES[0] + TIMES[1] * time_noise)  # (B,)
        noisy = torch.lerp(after, noise, time[:, None, None])
        predicted = self.transformer(
            hidden_states=torch.cat([noisy, references], dim=1).to(dtype),
            encoder_hidden_states=(states * mask[..., None]).to(dtype),
            encoder_hidden_states_mask=mask,
            timestep=time.to(dtype),
            img_shapes=[[(1, *shape), (1, *shape)]] * len(after),
            return_dict=False,
        )[0][:, : after.shape[1]].float()
        errors = (predicted - (noise - after)).square().mean(-1)  # (B, n)
        weight = 1 + (CHANGED - 1) * ((after - references).abs().mean(-1) > THRESHOLD).float()
        return (errors * weight).sum(1) / weight.sum(1)

    def _latents(
        self, images: Sequence[Image.Image], sizes_of: Sequence[Image.Image]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Packed, normalised latents of images, each at the size that the pipeline gives to another image."""
        pipe = self.pipe
        sizes = [vae_size(type(pipe), self.editor, image) for image in sizes_of]
        latents: dict[int, Tensor] = {}
        for width, height in sorted(set(sizes)):
            same_size = [number for number, size in enumerate(sizes) if size == (width, height)]
            batch = max(VAE_BATCH // (width * height), 1)
            for first in range(0, len(same_size), batch):
                numbers = same_size[first : first + batch]
                pixels = pipe.image_processor.preprocess([images[n] for n in numbers], height, width)
                pixels = pixels[:, :, None].to(pipe.vae.device, pipe.vae.dtype)  # (B, 3, 1, H, W)
                encoded = pipe._encode_vae_image(image=pixels, generator=None)[:, :, 0]  # (B, 16, H/8, W/8)
                latents |= zip(numbers, encoded, strict=True)
        ordered = [latents[number] for number in range(len(sizes))]
        packed = [pipe._pack_latents(one[None], 1, *one.shape)[0] for one in ordered]
        return packed, [(one.shape[1] // 2, one.shape[2] // 2) for one in ordered]
