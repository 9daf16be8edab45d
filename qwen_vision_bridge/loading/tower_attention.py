"""Attention of a vision tower over the stretches of one packed sequence: one call a length, not a stretch.

Without flash-attention, transformers cuts the packed sequence by `cu_seqlens` and calls attention once a
stretch: 100 windows in each of 28 blocks of the target at 1024², one image after the other in a batch. Here
stretches of equal length go through PyTorch's `scaled_dot_product_attention` together, and on a GPU in 16
bits those of several lengths through its `varlen_attn`. The function is registered in transformers'
`AttentionInterface` under a name that contains `flash`, which makes the towers hand over the whole sequence.
What depends on the grids alone (window order, positions, lengths) is kept.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from .fused import fused_layers
from .locks import model_lock

VisionAttention = Literal["batched", "stock"]
NAME = "batched_flash"  # transformers looks for "flash" in it
KEPT_GRIDS = 32  # sets of grids whose indices are kept for a tower

_plans = WeakTensorKeyDictionary()  # cu_seqlens tensor → _Plan; a tower passes the same tensor to every block


class _Plan(NamedTuple):
    """How a packed sequence falls into stretches of equal length."""

    groups: tuple[tuple[int, int], ...]
    """(how many stretches, tokens of each), in the order of `order`."""
    order: torch.Tensor | None
    """(T,) tokens with equal lengths side by side; None where they lie so already."""
    back: torch.Tensor | None
    """(T,) the inverse of `order`."""


def check_vision_attention(mode: Any) -> VisionAttention:
    """`batched` or `stock`.

    Raises:
        ValueError: anything else.
    """
    if mode not in ("batched", "stock"):
        raise ValueError(f'vision_attention is "batched" or "stock", not {mode!r}')
    return mode


@contextmanager
def tower_attention(tower: nn.Module, mode: VisionAttention = "batched") -> Iterator[None]:
    """Let a Qwen2.5-VL or Qwen3-VL tower attend in batches inside the `with`; afterwards it is as before.

    On a GPU its other layers are computed in fewer kernels (`fused`). A tower that someone gave another flash
    implementation keeps that.

    Args:
        tower: the bare vision tower.
        mode: `stock` leaves transformers' loop.

    Raises:
        ValueError: an unknown mode.
    """
    check_vision_attention(mode)
    with model_lock:
        before = tower.config._attn_implementation
        if mode == "stock" or ("flash" in (before or "") and before != NAME):
            yield
            return
        _register()
        handle = tower.register_forward_pre_hook(_give_indices, with_kwargs=True)
        tower.config._attn_implementation = NAME  # a property, which checks and stores
        try:
            with fused_layers(tower):
                yield
        finally:
            tower.config._attn_implementation = before
            handle.remove()


def batched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each stretch of a packed sequence, as transformers' attention functions are called.

    Args:
        query, key, value: (1, H, T, D).
        attention_mask: none; the stretches say who sees whom.
        cu_seq_lens_q: (stretches + 1,) rising token counts from 0 to T.

    Returns:
        (1, T, H, D), and None for the weights, which are not computed.
    """
    if attention_mask is not None:
        raise ValueError("packed stretches take no attention mask")
    plan = _plan_of(cu_seq_lens_q)
    packed = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # (1, T, H, D), as it lies in memory
    if len(plan.groups) > 1 and not dropout and _takes_varlen(query, scaling):
        return _varlen_attention(packed, cu_seq_lens_q, plan), None
    if plan.order is not None:
        packed = [tensor.index_select(1, plan.order) for tensor in packed]
    outputs, start = [], 0
    for count, length in plan.groups:
        stop = start + count * length
        parts = [tensor[0, start:stop].unflatten(0, (count, length)).transpose(1, 2) for tensor in packed]
        attended = functional.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (count, H, length, D) → (tokens, H, D)
        start = stop
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if plan.back is None else output.index_select(0, plan.back))[None], None


def _varlen_attention(packed: list[torch.Tensor], boundaries: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """All stretches in one kernel, (1, T, H, D) each → (1, T, H, D); the usual scale, 1/√D."""
    from torch.nn.attention.varlen import varlen_attn

    edges, longest = boundaries.to(torch.int32), max(length for _, length in plan.groups)
    return varlen_attn(*(tensor[0] for tensor in packed), edges, edges, longest, longest)[None]


def _takes_varlen(query: torch.Tensor, scaling: float | None) -> bool:
    """Whether PyTorch's kernel for stretches of several lengths takes such heads on this device."""
    width = query.shape[-1]
    usual = scaling is None or math.isclose(scaling, width**-0.5)
    if not (query.is_cuda and query.element_size() == 2 and width % 8 == 0 and usual):
        return False
    return _has_flash(query.device)


@cache
def _has_flash(device: torch.device) -> bool:
    available = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.disable  # it asks the device for lengths; around it a compiled block still fuses the rest
def _attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return batched_attention(*args, **kwargs)


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _plan_of(boundaries: torch.Tensor) -> _Plan:
    """The plan of a tensor of boundaries, worked out once: reading it waits for the device."""
    if (known := _plans.get(boundaries)) is not None:
        return known
    edges = boundaries.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    if len(set(lengths)) == 1:
        plan = _Plan(((len(lengths), lengths[0]),), None, None)
    else:
        plan = _grouped(edges, lengths, boundaries.device)
    _plans[boundaries] = plan
    return plan


def _grouped(edges: list[int], lengths: list[int], device: torch.device) -> _Plan:
    kinds = [length for length in dict.fromkeys(lengths) if length]
    tokens = [
        token
        for kind in kinds
        for start, length in zip(edges, lengths, strict=False)
        if length == kind
        for token in range(start, start + length)
    ]
    order = torch.tensor(tokens)
    groups = tuple((lengths.count(kind), kind) for kind in kinds)
    if tokens == list(range(len(tokens))):
        return _Plan(groups, None, None)
    return _Plan(groups, order.to(device), order.argsort().to(device))


def _give_indices(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: hand the tower what it would work out of its grids anew in every call."""
    grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    kept: OrderedDict[Any, dict[str, Any]] = tower.__dict__.setdefault("_indices_by_grid", OrderedDict())
    key = (tuple(map(tuple, grids.tolist())), grids.device, torch.is_inference_mode_enabled())
    if key not in kept:
        kept[key] = _indices(tower, grids)
        if len(kept) > KEPT_GRIDS:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return args, {**kept[key], **kwargs}


def _indices(tower: nn.Module, grids: torch.Tensor) -> dict[str, Any]:
    """transformers' own helpers of one tower, under the names by which its forward takes their results."""
    from transformers import vision_utils

    merge = tower.spatial_merge_size
    made: dict[str, Any] = {"position_ids": vision_utils.get_vision_position_ids(grids, merge)}
    made["cu_seqlens"], made["max_seqlen"] = vision_utils.get_vision_attention_seqlens(grids, tower.config)
    if hasattr(tower, "window_size"):
        order, edges = vision_utils.get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        made["window_index"], made["cu_window_seqlens"] = order.to(grids.device), edges
        made["max_window_seqlen"] = int(edges.diff().max())
    else:
        interpolate = vision_utils.get_vision_interpolation_indices_and_weights
        made["interp_indices"], made["interp_weights"] = interpolate(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    return made
