"""4-bit weights made layer by layer: close to the exact ones, small, and unharmed by group offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qwen_vision_bridge.loading.editors import quantise_to_4_bit
from qwen_vision_bridge.loading.towers import KEPT_IN_16_BITS


def test_layers_outside_skip_are_replaced_and_stay_close() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Sequential(nn.Linear(256, 128, bias=False)))
    inputs = torch.randn(16, 128)
    exact = model(inputs)
    assert quantise_to_4_bit(model, "cpu", torch.float32, skip=("2",)) == 1
    assert type(model[2][0]) is nn.Linear
    assert quantise_to_4_bit(model, "cpu", torch.float32) == 1
    assert model[0].weight.dtype is torch.uint8
    assert model[0].weight.nbytes == 128 * 256 // 2
    error = (model(inputs) - exact).norm() / exact.norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offloading_leaves_4_bit_weights_as_they_are(level: str) -> None:
    from diffusers.hooks import apply_group_offloading

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    quantise_to_4_bit(model, "cpu", torch.float32)
    inputs = torch.randn(16, 128)
    expected = model(inputs)
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
    hooked = [layer._diffusers_hook for layer in (model[0], model[2]) if hasattr(layer, "_diffusers_hook")]
    assert len(hooked) == (2 if level == "leaf_level" else len(hooked))  # as any other linear layer is
    for _ in range(2):
        assert torch.equal(model(inputs), expected)


@pytest.mark.slow
def test_strength_zero_is_stock_in_4_bits_with_group_offload(editor_folder: Path, photo: Image.Image) -> None:
    """Onto the same CPU: every step of the mode but the bus."""
    from diffusers import QwenImageEditPlusPipeline

    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
    from tests.conftest import SMALL

    pipe: Any = QwenImageEditPlusPipeline.from_pretrained(editor_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert quantise_to_4_bit(pipe.transformer, "cpu", torch.float32) > 0
    assert quantise_to_4_bit(pipe.text_encoder, "cpu", torch.float32, KEPT_IN_16_BITS) > 0
    assert type(pipe.text_encoder.model.visual.blocks[0].attn.qkv) is nn.Linear
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    editor = EnhancedQwenImageEdit(SMALL, "random", pipe=pipe, dtype=torch.float32, feature_cache=False)
    options = {"prompt": "make it blue", "num_inference_steps": 2}
    baseline, enhanced, _ = editor.compare(photo, **options)
    assert np.array_equal(np.asarray(editor.generate(photo, strength=0.0, **options)), np.asarray(baseline))
    assert not np.array_equal(np.asarray(enhanced), np.asarray(baseline))
