"""Training data rendered ahead by a `DataLoader`, and a pool of it on the device."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Arrays = dict[str, np.ndarray]
Render = Callable[[int, int], Arrays]
"""(first index, count) → arrays of leading dimension count; picklable, so of a module's top level."""


class _Chunks(Dataset):
    def __init__(self, render: Render, size: int) -> None:
        self.render, self.size = render, size

    def __getitem__(self, first: int) -> Arrays:
        return self.render(first, self.size)


def chunks(render: Render, size: int, workers: int, firsts: Iterable[int]) -> Iterator[Arrays]:
    """Chunks of `size` items that begin at each of the `firsts`, in order, rendered ahead by processes.

    Chunks stay numpy arrays: those go through pipes, while tensors need shared memory, of which containers
    often have only 64 MB.
    """
    loader = DataLoader(
        _Chunks(render, size),
        sampler=firsts,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy an unusable CUDA context
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # leaves the global one alone
    )
    return iter(loader)


def _unchanged(chunk: Arrays) -> Arrays:
    return chunk


def _start_worker(_number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Pool:
    """Up to `capacity` items on the device; when it is full, new items replace the oldest."""

    def __init__(self, capacity: int, device: torch.device | str) -> None:
        self.capacity, self.device = capacity, torch.device(device)
        self.filled = 0
        self._next = 0
        self._tensors: dict[str, Tensor] = {}

    def add(self, chunk: dict[str, np.ndarray | Tensor]) -> None:
        """Copy items in; the first chunk decides names, shapes and dtypes.

        Raises:
            ValueError: more items than the pool holds, or other names than the first chunk's.
        """
        rows = {name: torch.as_tensor(values) for name, values in chunk.items()}
        count = len(next(iter(rows.values())))
        if count > self.capacity:
            raise ValueError(f"a chunk of {count} items in a pool of {self.capacity}")
        if not self._tensors:
            for name, values in rows.items():
                shape = (self.capacity, *values.shape[1:])
                self._tensors[name] = torch.empty(shape, dtype=values.dtype, device=self.device)
        if rows.keys() != self._tensors.keys():
            raise ValueError(f"the pool has {sorted(self._tensors)}, the chunk {sorted(rows)}")
        before_end = min(count, self.capacity - self._next)
        for name, values in rows.items():
            if self.device.type == "cuda" and values.device.type == "cpu":
                values = values.pin_memory()
            items = self._tensors[name]
            items[self._next : self._next + before_end].copy_(values[:before_end], non_blocking=True)
            items[: count - before_end].copy_(values[before_end:], non_blocking=True)
        self._next = (self._next + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """Items by index below `filled`; `index` (n,) is on the device."""
        return {name: values.index_select(0, index) for name, values in self._tensors.items()}

    def sample(self, count: int) -> dict[str, Tensor]:
        """Random items, with replacement."""
        return self.gather(torch.randint(self.filled, (count,), device=self.device))


class Feed:
    """A pool that takes in chunks as they are rendered, for the duration of a `with` block.

    Args:
        chunk: items in a chunk. workers: rendering processes; without any, rendering waits its turn.
        first: index of the first item.
    """

    def __init__(
        self,
        render: Render,
        chunk: int,
        workers: int,
        capacity: int,
        device: torch.device | str,
        first: int = 0,
    ) -> None:
        self.pool = Pool(capacity, device)
        self.prepare: Callable[[Arrays], dict[str, np.ndarray | Tensor]] = dict
        """Applied to a chunk before it is kept."""
        self._waits = not workers
        self._chunks = chunks(render, chunk, workers, itertools.count(first, chunk))
        self._executor = ThreadPoolExecutor(1)
        self._chunk: Future[Arrays] = self._executor.submit(next, self._chunks)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_error: object) -> None:
        self._executor.shutdown()
        del self._chunks, self._chunk  # ends the workers

    def fill(self, count: int) -> None:
        """Wait until the pool holds so many items, or is full."""
        while self.pool.filled < min(count, self.pool.capacity):
            self._take()

    def refill(self) -> None:
        """Take in a chunk if one is ready."""
        if self._waits or self._chunk.done():
            self._take()

    def _take(self) -> None:
        chunk = self._chunk.result()  # raises what a worker raised
        self._chunk = self._executor.submit(next, self._chunks)
        self.pool.add(self.prepare(chunk))
