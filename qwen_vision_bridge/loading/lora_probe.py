"""Small seeded inputs on which a LoRA must show an effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def probe_inputs(model: Any) -> dict[str, Any]:
    """A few seeded tokens for a Qwen-Image or Wan transformer, or for a language model."""
    config, generator = model.config, torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if hasattr(model, "patch_embed") and hasattr(model, "merger"):  # a vision tower
        size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return {"hidden_states": noise(16, size), "grid_thw": torch.tensor([[1, 4, 4]])}
    if hasattr(model, "language_model") or hasattr(getattr(model, "model", None), "language_model"):
        return {"input_ids": torch.arange(8)[None]}
    time = torch.full((1,), 0.5)
    if "joint_attention_dim" in config:  # Qwen-Image: packed latents
        return {
            "hidden_states": noise(1, 4, config["in_channels"]),
            "encoder_hidden_states": noise(1, 8, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool),
            "timestep": time,
            "img_shapes": [[(1, 2, 2)]],
        }
    _, height, width = config["patch_size"]
    inputs = {
        "hidden_states": noise(1, config["in_channels"], 1, 2 * height, 2 * width),
        "encoder_hidden_states": noise(1, 8, config["text_dim"]),
        "timestep": 500 * torch.ones(1),
    }
    if config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = noise(1, 257, config["image_dim"])
    return inputs
