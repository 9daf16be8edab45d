"""Local SGD: processes train copies of one model on different data and average them every few steps.

Stich 2019, with the moments averaged as well: two devices see twice the data, and few steps wait for the
network. Started by torchrun; without it there is one process, and these functions do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Rank of this process."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_of(device: str) -> torch.device:
    """The device of this process: `cuda` is one device a process."""
    if device == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Connect the processes for the `with` block."""
    if count() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def average(tensors: list[Tensor], stop: bool = False) -> bool:
    """Set float32 tensors to their mean over all peers; return whether any of them wants to `stop`.

    Raises:
        ValueError: a tensor of another dtype.
    """
    if count() == 1:
        return stop
    if other := {tensor.dtype for tensor in tensors} - {torch.float32}:
        raise ValueError(f"peers average float32, got {other}")
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_full((1,), float(stop))])
    dist.all_reduce(flat)
    flat /= count()
    sizes = [tensor.numel() for tensor in tensors]
    *means, stops = flat.split([*sizes, 1])
    torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)])
    return bool(stops.item() > 0)
