"""Fused layers of a vision tower: fewer kernels and fewer passes over a GPU's memory.

In transformers a norm of Qwen's vision towers is eight kernels, most of them over every channel in 32 bits;
the rotation of queries and keys and the feed-forward layers are as fine-grained. In 16 bits on a GPU these
passes and their launches cost more than the matrix products. Here they are computed as

* norms: PyTorch's own `rms_norm`, one kernel;
* rotation: queries and keys at once, in 32 bits as before, without copies of their halves;
* feed-forward layers whose width is no multiple of the 16 bytes that cuBLAS' fast kernels load at a time (the
  target's 3420 channels): zero padding up to the next multiple, for images of many patches. A channel of
  zeros is activation(0) · 0 = 0.

Sums are equal up to rounding. Nothing is stored on a model, so its weights, and what saves, moves or offloads
them, are unaffected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .locks import model_lock

CHANNELS = 8  # of 16 bits fill 16 bytes
PADDED_FROM = 2048  # patches; below, the GPU waits for launches, and padding adds three
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class _Fused(NamedTuple):
    """The function that computes a layer in place of its class."""

    call: Callable[..., torch.Tensor]
    min_patches: int = 0
    """The number of patches from which it is faster."""


@contextmanager
def fused_layers(tower: nn.Module) -> Iterator[None]:
    """Fuse a tower's norms, rotations and feed-forward layers inside the `with`.

    This applies to calls in 16 bits on a GPU without gradients, and to layers without hooks: offloaded layers
    and quantised feed-forward layers work as before. Compiled blocks are left to their compiler, which would
    recompile with every `with`.

    Args:
        tower: the bare vision tower of a Qwen2.5-VL or Qwen3-VL model.
    """
    with model_lock:
        layers = _fusible_layers(tower)
        for layer, fused in layers:
            layer.forward = partial(_forward, layer, fused)
        try:
            yield
        finally:
            for layer, _ in layers:
                del layer.forward


def _fusible_layers(tower: nn.Module) -> list[tuple[nn.Module, _Fused]]:
    compiled = {part for module in tower.modules() if module._compiled_call_impl for part in module.modules()}
    return [
        (module, fused)
        for module in tower.modules()
        if (fused := _fused(module)) and module not in compiled and not _is_hooked(module)
    ]


def padded_feed_forward(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """`down(act(gate(x)) · up(x))` with the inner channels zero-padded to a multiple of 8.

    Args:
        layer: with `gate_proj`, `up_proj`, `down_proj` and `act_fn`, as transformers has them.
        hidden: (..., width).

    Returns:
        (..., width).
    """
    padding = -layer.gate_proj.out_features % CHANNELS
    gate, up = (_padded_linear(linear, hidden, padding) for linear in (layer.gate_proj, layer.up_proj))
    down = functional.pad(layer.down_proj.weight, (0, padding))
    return functional.linear(layer.act_fn(gate) * up, down, layer.down_proj.bias)


def fused_norm(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Root mean square norm over the last axis, (..., width) → (..., width), rounded once."""
    return functional.rms_norm(hidden, layer.weight.shape, layer.weight, layer.variance_epsilon)


def fused_attention(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **options: object,
) -> torch.Tensor:
    """Self-attention over a packed sequence with queries and keys rotated at once.

    Args:
        layer: with `qkv`, `proj`, `num_heads` and `scaling`, as transformers has them.
        hidden_states: (T, width).
        cu_seqlens: (segments + 1,) rising token counts from 0 to T.
        position_embeddings: cosines and sines, (T, D) each.

    Returns:
        (T, width).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heads = layer.qkv(hidden_states).unflatten(-1, (3, layer.num_heads, -1))
    query, key = rotated(heads[:, :2], *position_embeddings).unbind(1)
    packed = (tensor.transpose(0, 1)[None] for tensor in (query, key, heads[:, 2]))
    attend = ALL_ATTENTION_FUNCTIONS[layer.config._attn_implementation]
    options |= {"attention_mask": None, "scaling": layer.scaling, "cu_seq_lens_q": cu_seqlens}
    attended, _ = attend(layer, *packed, **options)
    return layer.proj(attended.flatten(-2)[0])


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the towers' rotary positions: halves (x, y) of a head → (x cos − y sin, y cos + x sin).

    Args:
        heads: (T, tensors, H, D); rounded once, after sums in 32 bits.
        cos, sin: (T, D).

    Returns:
        (T, tensors, H, D), contiguous.
    """
    half = heads.shape[-1] // 2
    cos, sin = (angles.float()[:, None, None] for angles in (cos, sin))
    turned, scaled = torch.empty_like(heads, memory_format=torch.contiguous_format), heads * cos
    for mine, other, sign in ((slice(half), slice(half, None), -1), (slice(half, None), slice(half), 1)):
        part = turned[..., mine]
        torch.addcmul(scaled[..., mine], heads[..., other], sin[..., mine], value=sign, out=part)
    return turned


def _padded_linear(linear: nn.Linear, hidden: torch.Tensor, padding: int) -> torch.Tensor:
    weight = functional.pad(linear.weight, (0, 0, 0, padding))
    bias = None if linear.bias is None else functional.pad(linear.bias, (0, padding))
    return functional.linear(hidden, weight, bias)


def _forward(layer: nn.Module, fused: _Fused, hidden_states: torch.Tensor, **options: object) -> torch.Tensor:
    is_faster = _pays(hidden_states) and len(hidden_states) >= fused.min_patches
    return (fused.call if is_faster else type(layer).forward)(layer, hidden_states, **options)


def _pays(hidden: torch.Tensor) -> bool:
    # Weights may need a gradient where the input has none, and `rotated` passes none on.
    return hidden.is_cuda and hidden.element_size() == 2 and not torch.is_grad_enabled()


def _fused(module: nn.Module) -> _Fused | None:
    """The fused function of this layer; None for other layers."""
    parts, settings = module._modules, vars(module)  # hasattr costs milliseconds over a tower's modules
    if "qkv" in parts and "proj" in parts and "num_heads" in settings and "scaling" in settings:
        return _Fused(fused_attention)
    if "variance_epsilon" in settings:
        return _Fused(fused_norm)
    if "act_fn" not in parts:
        return None
    linears = [parts.get(name) for name in PROJECTIONS]
    plain = all(type(linear) is nn.Linear and not _is_hooked(linear) for linear in linears)
    odd = plain and linears[0].out_features % CHANNELS
    return _Fused(padded_feed_forward, PADDED_FROM) if odd else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's `forward`."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
