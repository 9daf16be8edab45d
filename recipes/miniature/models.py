"""The stock vision-language models over batches whose prompts all show as many images of one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen_vision_bridge.loading.tower_attention import tower_attention

from . import build as miniature
from .data import opening


class Reader(nn.Module):
    """A miniature Qwen3-VL or Qwen2.5-VL with its image processor.

    Parameters are the stock model's own: training this trains that.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self._positions: dict[tuple[int, int], Tensor] = {}  # (images shown, length) → (3, 1, L)

    def inputs(self, images: Tensor, text: Tensor) -> dict[str, Tensor]:
        """What the stock model takes.

        Args:
            images: (B, shown, H, W, 3) uint8.
            text: (B, T) ids from the prompt on.
        """
        batch, shown = images.shape[:2]
        start = torch.tensor(opening(shown)[0], device=text.device).expand(batch, -1)
        ids = torch.cat([start, text.long()], dim=1)
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2)
        seen = self.processor.image_processor(pixels, return_tensors="pt", device=images.device)
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": types, **seen.to(images.device)}

    def hidden(self, images: Tensor, text: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, L, D): the opening first, then the text."""
        inputs = self.inputs(images, text)
        positions = self._positions_of(inputs, images.shape[1]).expand(-1, len(images), -1)
        with tower_attention(self.model.model.visual):
            return self.model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits at the positions of the text, (B, T, V)."""
        return self.model.lm_head(self.hidden(images, text)[:, -text.shape[1] :])

    def _positions_of(self, inputs: dict[str, Tensor], shown: int) -> Tensor:
        """Positions (3, 1, L) by the stock rule, which takes one row after the other: all rows are alike."""
        key = shown, inputs["input_ids"].shape[1]
        if key not in self._positions:
            row = {name: inputs[name][:1] for name in ("input_ids", "mm_token_type_ids")}
            grids = inputs["image_grid_thw"][:shown]
            self._positions[key] = self.model.model.get_rope_index(**row, image_grid_thw=grids)[0]
        return self._positions[key]


def build_reader(role: str, seed: int, folder: str | None = None) -> Reader:
    """The `source` or `target`, random from a seed or from a stock folder, on the CPU in fp32."""
    import transformers

    kind = "Qwen3VL" if role == "source" else "Qwen2_5_VL"
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    if folder:
        model = model_class.from_pretrained(folder, dtype=torch.float32)
    else:
        vision, text = (getattr(miniature, f"{role.upper()}_{part}") for part in ("VISION", "TEXT"))
        config = miniature.vision_language_config(getattr(transformers, f"{kind}Config"), vision, text)
        model = miniature.randomise(model_class(config).float(), seed)
        with torch.no_grad():  # also the output layer: logits of size 1 to begin with
            model.model.language_model.embed_tokens.weight.mul_(0.1)
            if role == "source":  # position embeddings of full size would drown the patches
                model.model.visual.pos_embed.weight.mul_(0.1)
    processor = miniature.source_processor() if role == "source" else miniature.target_processor()
    return Reader(model, processor)


def build_transformer(seed: int, folder: str | None = None) -> nn.Module:
    """The diffusion transformer in fp32, random from a seed or from a stock folder.

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


def build_vae(seed: int, folder: str | None = None) -> nn.Module:
    """The VAE in fp32, random from a seed or from a stock folder; what a single image never meets is zero.

    An image is one frame after zeros: of a causal kernel it meets the last slice in time alone.
    """
    from diffusers import AutoencoderKLQwenImage

    if folder:
        vae = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        vae = miniature.randomise(AutoencoderKLQwenImage(**miniature.VAE), seed)
    with torch.no_grad():
        for convolution in (part for part in vae.modules() if isinstance(part, nn.Conv3d)):
            convolution.weight[:, :, :-1] = 0
    return vae
