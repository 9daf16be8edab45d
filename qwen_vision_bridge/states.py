"""Hidden states of the source's language model at the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .specs import LEVEL_NAMES


def source_states(model: Any, inputs: Any, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """States of a whole Qwen3-VL after some layers, as the next layer sees them, and of the last one.

    Args:
        inputs: of the whole processor, on the model's device.
        layers: after how many layers early, mid and late are taken.

    Returns:
        `early`, `mid`, `late` and `merged`, each (N, D) in image order; `merged` is after the final norm.
    """
    at_image = inputs["input_ids"] == model.config.image_token_id  # (1, T)
    tower = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    states = model.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    features = {}
    for name, layer in zip(LEVEL_NAMES, layers, strict=True):
        features[name] = states[layer][at_image]  # (N, D), as the layer left it
        # The first layers' outputs are recorded before DeepStack adds its level to them.
        if layer <= len(tower.deepstack_features) and layer < len(states) - 1:
            features[name] = features[name] + tower.deepstack_features[layer - 1].to(features[name].dtype)
    return {**features, "merged": states[-1][at_image]}
