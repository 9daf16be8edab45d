"""bitsandbytes quantisation of the editor: by the libraries while they load, or layer by layer.

The second is for cards that could not hold what the libraries quantise at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ENCODER_KEPT = (
    "model.visual",
    "lm_head",
)  # the tower's output is what the bridge adds to: it stays in 16 bits


def quantisation_config(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """What quantises each large part of a pipeline while it is loaded; the target tower stays in 16 bits."""
    from diffusers import BitsAndBytesConfig as DiffusersConfig
    from transformers import BitsAndBytesConfig as TransformersConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    # "visual" alone would not match.
    encoder = TransformersConfig(**settings, llm_int8_skip_modules=list(ENCODER_KEPT))
    return {"transformer": DiffusersConfig(**settings), "text_encoder": encoder}


def quantise_to_4_bit(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> int:
    """Quantise a model's linear layers to NF4 on a device, one at a time, their weights left in CPU memory.

    The libraries' loaders quantise whole models on the GPU: 12 GB for the transformer, which a card of 12 GB
    does not have. The scales (an eighth of the weights' bytes) stay on the device, where group offloading,
    which moves parameters alone, leaves them.

    Args:
        model: in CPU memory, in 16 bits.
        skip: names of submodules that stay as they are.

    Returns:
        How many layers were replaced.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    count = 0
    for path, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            full = f"{path}.{name}".lstrip(".")
            if type(layer) is not nn.Linear or any(
                full == kept or full.startswith(f"{kept}.") for kept in skip
            ):
                continue
            made = Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
            made.weight = weight.to(device)  # quantises
            made.weight.data = made.weight.data.cpu()
            made.bias = layer.bias
            setattr(parent, name, made)
            count += 1
    return count
