"""Attention of a vision tower over the segments of one packed sequence: one call a length, not a segment.

Without flash-attention, transformers cuts the packed sequence by `cu_seqlens` and calls attention once a
segment: for 100 windows in each of 28 blocks of the target at 1024², and for each image of a batch. Here
segments of equal length go through PyTorch's `scaled_dot_product_attention` together, and on a GPU in 16 bits
those of several lengths through its `varlen_attn`. The function is registered in transformers'
`AttentionInterface` under a name that contains `flash`, which makes the towers pass the whole sequence. What
depends on the grids alone (window order, positions, lengths) is cached.
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
Indices = dict[str, torch.Tensor | int]
NAME = "batched_flash"  # transformers checks for "flash" in it
CACHED_GRIDS = 32  # sets of grids whose indices are cached for a tower

_plans = WeakTensorKeyDictionary()  # cu_seqlens tensor → _Plan; a tower passes the same tensor to every block


class _Plan(NamedTuple):
    """How a packed sequence falls into segments of equal length."""

    groups: tuple[tuple[int, int], ...]
    """(number of segments, tokens of each), in the order of `order`."""
    order: torch.Tensor | None
    """(T,) tokens sorted so that equal lengths are side by side; None where they are already."""
    inverse: torch.Tensor | None
    """(T,) the inverse of `order`."""


def check_vision_attention(mode: str) -> VisionAttention:
    """Return the mode; a ValueError where it is neither `batched` nor `stock`."""
    if mode == "batched":
        return "batched"
    if mode == "stock":
        return "stock"
    raise ValueError(f'vision_attention is "batched" or "stock", not {mode!r}')


@contextmanager
def tower_attention(tower: nn.Module, mode: VisionAttention = "batched") -> Iterator[None]:
    """Batch the attention of a Qwen2.5-VL or Qwen3-VL tower inside the `with`; afterwards it is as before.

    On a GPU its other layers are fused too (see `fused`). A tower with another flash implementation keeps it.

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
        _register(any(module._compiled_call_impl for module in tower.modules()))
        handle = tower.register_forward_pre_hook(_pass_indices, with_kwargs=True)
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
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each segment of a packed sequence, with the signature that transformers expects.

    Args:
        query, key, value: (1, H, T, D).
        attention_mask: None; the segments take its place.
        cu_seq_lens_q: (segments + 1,) rising token counts from 0 to T.

    Returns:
        (1, T, H, D), and None for the weights, which are not computed.
    """
    if attention_mask is not None:
        raise ValueError("attention over packed segments takes no mask")
    plan = _plan_of(cu_seq_lens_q)
    packed = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # (1, T, H, D), as it lies in memory
    if len(plan.groups) > 1 and not dropout and _takes_varlen(query, scaling):
        return _varlen_attention(packed, cu_seq_lens_q, plan), None
    if plan.order is not None:
        packed = [tensor.index_select(1, plan.order) for tensor in packed]
    outputs, start = [], 0
    for count, length in plan.groups:
        stop = start + count * length
        q, k, v = (tensor[0, start:stop].unflatten(0, (count, length)).transpose(1, 2) for tensor in packed)
        attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (count, H, length, D) → (tokens, H, D)
        start = stop
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if plan.inverse is None else output.index_select(0, plan.inverse))[None], None


def _varlen_attention(packed: list[torch.Tensor], boundaries: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """All segments in one kernel, (1, T, H, D) each → (1, T, H, D); the usual scale, 1/√D."""
    from torch.nn.attention.varlen import varlen_attn

    edges, longest = boundaries.to(torch.int32), max(length for _, length in plan.groups)
    return varlen_attn(*(tensor[0] for tensor in packed), edges, edges, longest, longest)[None]


def _takes_varlen(query: torch.Tensor, scaling: float | None) -> bool:
    """Whether PyTorch's kernel for segments of several lengths takes these heads on this device."""
    width = query.shape[-1]
    is_usual = scaling is None or math.isclose(scaling, width**-0.5)
    if not (query.is_cuda and query.element_size() == 2 and width % 8 == 0 and is_usual):
        return False
    return _has_flash(query.device)


@cache
def _has_flash(device: torch.device) -> bool:
    available = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


def _attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return batched_attention(*args, **kwargs)


def _register(compiled: bool) -> None:
    """Register the attention; beside compiled blocks it stays out of their graphs.

    It reads lengths from the device, and a block still fuses the rest. The compiler is imported only there:
    it takes seconds.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ALL_ATTENTION_FUNCTIONS.get(NAME)
    if known is None or (compiled and known is _attention):
        ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(_attention) if compiled else _attention)


def _plan_of(boundaries: torch.Tensor) -> _Plan:
    """The plan of a tensor of boundaries, computed once: reading it waits for the device."""
    if (cached := _plans.get(boundaries)) is not None:
        return cached
    edges = boundaries.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    if len(set(lengths)) == 1:
        plan = _Plan(((len(lengths), lengths[0]),), None, None)
    else:
        plan = _grouped(edges, lengths, boundaries.device)
    _plans[boundaries] = plan
    return plan


def _grouped(edges: list[int], lengths: list[int], device: torch.device) -> _Plan:
    tokens: dict[int, list[int]] = {}  # by length, in order of appearance
    for start, length in zip(edges, lengths, strict=False):
        if length:
            tokens.setdefault(length, []).extend(range(start, start + length))
    groups = tuple((len(members) // length, length) for length, members in tokens.items())
    order = torch.tensor([token for members in tokens.values() for token in members])
    if torch.equal(order, torch.arange(len(order))):
        return _Plan(groups, None, None)
    return _Plan(groups, order.to(device), order.argsort().to(device))


def _pass_indices(
    tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: pass the tower what it would compute from its grids anew in every call."""
    grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    cache: OrderedDict[object, Indices] = tower.__dict__.setdefault("_indices_by_grid", OrderedDict())
    key = (tuple(map(tuple, grids.tolist())), grids.device, torch.is_inference_mode_enabled())
    if key not in cache:
        cache[key] = _indices(tower, grids)
        if len(cache) > CACHED_GRIDS:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return args, {**cache[key], **kwargs}


def _indices(tower: nn.Module, grids: torch.Tensor) -> Indices:
    """Results of transformers' own helpers, under the names by which a tower's forward takes them."""
    from transformers import vision_utils

    merge = tower.spatial_merge_size
    indices: Indices = {"position_ids": vision_utils.get_vision_position_ids(grids, merge)}
    indices["cu_seqlens"], indices["max_seqlen"] = vision_utils.get_vision_attention_seqlens(
        grids, tower.config
    )
    if hasattr(tower, "window_size"):
        order, edges = vision_utils.get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        indices["window_index"], indices["cu_window_seqlens"] = order.to(grids.device), edges
        indices["max_window_seqlen"] = int(edges.diff().max())
    else:
        interpolate = vision_utils.get_vision_interpolation_indices_and_weights
        indices["interp_indices"], indices["interp_weights"] = interpolate(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    return indices
