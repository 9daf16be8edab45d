"""Feed-forward layers of a width that a GPU's matrix units take badly, padded while they work.

The target's vision tower has feed-forward layers of 3420 channels. In 16 bits such a row is no multiple of
the 16 bytes that cuBLAS' fast kernels load at a time. With channels of zeros up to 3424 the sums are the
same: a padded channel is activation(0) · 0 = 0. The padding is made anew in every call, so that a model's own
weights, and what saves, moves or offloads them, never see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CHANNELS = 8  # of 16 bits fill 16 bytes
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def padded_widths(model: nn.Module) -> Iterator[None]:
    """Pad a model's gated feed-forward layers inside the `with`, where their width needs it; equal results
    within rounding.

    Only calls in 16 bits on a GPU are padded, and only layers of plain `nn.Linear` that nothing has hooked:
    quantised layers, and those that are brought to the GPU one by one, work as before. Compiled blocks are
    left to their compiler, which would have to begin anew with every `with`.
    """
    compiled = {part for module in model.modules() if module._compiled_call_impl for part in module.modules()}
    layers = [module for module in model.modules() if _is_of_odd_width(module) and module not in compiled]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def padded_feed_forward(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """`down(act(gate(x)) · up(x))` with zero channels between, up to a multiple of 8.

    Args:
        layer: with `gate_proj`, `up_proj`, `down_proj` and `act_fn`, as transformers has them.
        hidden: (..., width).

    Returns:
        (..., width).
    """
    missing = -layer.gate_proj.out_features % CHANNELS
    gate, up = (_wider(linear, hidden, missing) for linear in (layer.gate_proj, layer.up_proj))
    narrower = functional.pad(layer.down_proj.weight, (0, missing))
    return functional.linear(layer.act_fn(gate) * up, narrower, layer.down_proj.bias)


def _wider(linear: nn.Linear, hidden: torch.Tensor, missing: int) -> torch.Tensor:
    weight = functional.pad(linear.weight, (0, 0, 0, missing))
    bias = None if linear.bias is None else functional.pad(linear.bias, (0, missing))
    return functional.linear(hidden, weight, bias)


def _forward(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    call = padded_feed_forward if _pays(hidden) else type(layer).forward
    return call(layer, hidden)


def _pays(hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and hidden.element_size() == 2


def _is_of_odd_width(module: Any) -> bool:
    linears = [getattr(module, name, None) for name in PROJECTIONS]
    plain = all(type(linear) is nn.Linear for linear in linears) and hasattr(module, "act_fn")
    if not plain or linears[0].out_features % CHANNELS == 0:
        return False
    return not any(_is_hooked(one) for one in (module, *linears))


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
