"""What the stock edit pipeline gives its transformer, for batches; figures come from the pipeline itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import tokenizer as tokens
from .data import PROMPT_TOKENS, closing, encode, opening
from .models import Reader

SIDE = 16  # tokens a side of a packed latent
CUT = tokens.TEMPLATE_PREFIX_TOKENS


class Editor(nn.Module):
    """Frozen target and VAE with the trained transformer, for images of 128² px."""

    def __init__(self, target: Reader, vae: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.target, self.vae, self.transformer = target.eval(), vae.eval(), transformer
        for frozen in (target, vae):
            frozen.requires_grad_(False)
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        nothing = torch.tensor([*encode(" "), *closing()])
        self.register_buffer("nothing", nothing, persistent=False)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Packed, normalised latents (B, 256, 32) of uint8 images (B, 128, 128, 3)."""
        from diffusers import QwenImageEditPlusPipeline

        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        z = self.vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0].float()
        z = (z - self.latents_mean) / self.latents_std
        return QwenImageEditPlusPipeline._pack_latents(z, *z.shape)

    def references(self, images: Tensor) -> Tensor:
        """Packed latents (B, shown·256, 32) of all images of each prompt, uint8 (B, shown, 128, 128, 3)."""
        latents = self.to_latents(images.flatten(0, 1))
        return latents.reshape(len(images), -1, latents.shape[-1])

    @torch.no_grad()
    def embed(self, small: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """States that the transformer reads: of images with prompts, and of the same images with none.

        Args:
            small: (B, shown, 64, 64, 3) uint8.
            text: (B, P) ids, prompt and template's end.

        Returns:
            (B, T, D) with the padding still in it, and its tail (B, Q, D) for the empty negative prompt.
        """
        cut = len(opening(small.shape[1])[0])
        with_prompt = self.target.hidden(small, text)[:, CUT:]
        without = self.target.hidden(small, self.nothing.expand(len(small), -1))[:, cut:]
        return with_prompt, without

    def conditions(
        self, states: Tensor, empty: Tensor, length: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, D) and their mask (B, T); where `dropped` (B,), those without a prompt.

        Args:
            length: (B,) tokens of prompt and template's end.
        """
        total = states.shape[1]
        seen = total - PROMPT_TOKENS
        places = torch.arange(total, device=states.device)
        without = torch.cat([states[:, :seen], empty], dim=1)
        without = nn.functional.pad(without, (0, 0, 0, total - without.shape[1]))
        states = torch.where(dropped[:, None, None], without, states)
        lengths = torch.where(dropped, empty.shape[1], length)
        real = places[None] < seen + lengths[:, None]
        return states * real[..., None], real

    def velocity(
        self,
        noisy: Tensor,
        references: Tensor,
        states: Tensor,
        real: Tensor,
        time: Tensor,
        transformer: nn.Module | None = None,
    ) -> Tensor:
        """Predicted velocity (B, 256, 32) at time 1 (noise) to 0, for references (B, shown·256, 32).

        Args:
            transformer: another than the editor's own.
        """
        batch, length, _ = noisy.shape
        shapes = [[(1, SIDE, SIDE)] * (1 + references.shape[1] // length)] * batch
        out = (transformer or self.transformer)(
            hidden_states=torch.cat([noisy, references.to(noisy.dtype)], dim=1),
            encoder_hidden_states=states.to(noisy.dtype),
            encoder_hidden_states_mask=real,
            timestep=time,
            img_shapes=shapes,
            return_dict=False,
        )[0]
        return out[:, :length]
