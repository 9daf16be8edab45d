"""Training data rendered by background processes, and a pool of it on the device."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SHARED_MEMORY = Path("/dev/shm")
LEAST_FREE = 2 << 30  # bytes: containers often have 64 MB of shared memory, which a few chunks would fill
PATIENCE = 1.0  # seconds between two looks at whether the other side is alive


class Feed:
    """Chunks of items, rendered ahead by processes that live as long as the `with` block.

    Args:
        make: (first index, count) → arrays of leading dimension count; picklable, so of a module's top level.
        chunk: items in a chunk; at most 2·workers chunks are being rendered or waiting.
        first: index of the first item.
        limit: how many items in all, the last chunk may be shorter; None is without end.
        ordered: chunks come in the order of their indices, not of their completion.
    """

    def __init__(
        self,
        make: Callable[[int, int], Arrays],
        chunk: int,
        workers: int,
        first: int = 0,
        limit: int | None = None,
        ordered: bool = False,
    ) -> None:
        self._make, self._chunk, self._workers, self._first = make, chunk, workers, first
        self._end = None if limit is None else first + limit
        self._ordered, self._next = ordered, first
        self._ready: dict[int, list[str]] = {}  # first index → names of arrays, announced and not yet taken
        self._left = None if limit is None else -(-limit // chunk)
        self._failure: str | None = None
        self._processes: list[Any] = []

    def __enter__(self) -> Feed:
        context = multiprocessing.get_context("spawn")  # a fork would copy a CUDA context that cannot be used
        self._folder = Path(tempfile.mkdtemp(prefix="feed-", dir=_fast_folder()))
        self._stop, self._announced = context.Event(), context.Queue()
        self._slots = context.Semaphore(2 * self._workers)
        self._index = context.Value("q", self._first)  # kept here: children open its lock by name, later
        job = (self._make, self._chunk, self._end, self._folder)
        kept = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)  # libraries read them when the child imports them
        try:
            for _ in range(self._workers):
                arguments = (job, self._index, self._slots, self._announced, self._stop)
                self._processes.append(context.Process(target=_work, args=arguments, daemon=True))
                self._processes[-1].start()
        except BaseException:  # whatever it is, it passes on, and no process stays
            self.__exit__()
            raise
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for process in self._processes:
            process.terminate()  # in the middle of rendering: what it would write is not wanted
        for process in self._processes:
            process.join()
        self._announced.close()
        self._announced.cancel_join_thread()
        shutil.rmtree(self._folder, ignore_errors=True)

    def poll(self, block: bool = False) -> tuple[int, Arrays] | None:
        """The next finished chunk with the index of its first item, or None.

        Args:
            block: wait for one; None then means that all are taken.

        Raises:
            RuntimeError: a worker failed, with its traceback, or was killed.
        """
        while self._left != 0:
            self._listen(block)
            first = self._next if self._ordered else next(iter(self._ready), None)
            if first in self._ready:
                return first, self._take(first)
            if not block:
                return None
        return None

    def _listen(self, block: bool) -> None:
        """Hear what is announced; with `block` and nothing at hand, for up to PATIENCE seconds."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        wait = block and (self._next if self._ordered else next(iter(self._ready), None)) not in self._ready
        try:
            while True:
                first, names, failure = self._announced.get(wait, PATIENCE)
                if failure is not None:
                    self._failure = f"rendering the chunk at {first} failed:\n{failure}"
                    raise RuntimeError(self._failure)
                self._ready[first], wait = names, False
        except queue.Empty:
            pass
        if killed := [process.exitcode for process in self._processes if process.exitcode]:
            self._failure = f"workers ended with exit codes {killed} (negative: by that signal)"
            raise RuntimeError(self._failure)

    def _take(self, first: int) -> Arrays:
        arrays = {}
        for number, name in enumerate(self._ready.pop(first)):
            path = _array_path(self._folder, first, number)
            arrays[name] = np.load(path)
            path.unlink()
        self._slots.release()
        self._next += self._chunk
        if self._left is not None:
            self._left -= 1
        return arrays


class Pool:
    """Up to `capacity` items on the device; when it is full, new ones take the place of the oldest."""

    def __init__(self, capacity: int, device: torch.device | str) -> None:
        self.capacity, self.device = capacity, torch.device(device)
        self.filled = 0
        self._place = 0
        self._tensors: dict[str, Tensor] = {}

    def add(self, chunk: dict[str, np.ndarray | Tensor]) -> None:
        """Copy items in; the first chunk decides names, shapes and dtypes.

        Raises:
            ValueError: more items than the pool holds, or other names than the first chunk's.
        """
        rows = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in chunk.items()}
        count = len(next(iter(rows.values())))
        if count > self.capacity:
            raise ValueError(f"a chunk of {count} items in a pool of {self.capacity}")
        if not self._tensors:
            for name, values in rows.items():
                shape = (self.capacity, *values.shape[1:])
                self._tensors[name] = torch.empty(shape, dtype=values.dtype, device=self.device)
        if rows.keys() != self._tensors.keys():
            raise ValueError(f"the pool has {sorted(self._tensors)}, the chunk {sorted(rows)}")
        ahead = min(count, self.capacity - self._place)
        for name, values in rows.items():
            if self.device.type == "cuda" and values.device.type == "cpu":
                values = values.pin_memory()
            place = self._tensors[name]
            place[self._place : self._place + ahead].copy_(values[:ahead], non_blocking=True)
            place[: count - ahead].copy_(values[ahead:], non_blocking=True)
        self._place = (self._place + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """Items by place, which lie below `filled`; `index` (n,) is on the device."""
        return {name: values.index_select(0, index) for name, values in self._tensors.items()}


def _fast_folder() -> Path | None:
    """Shared memory where there is enough, else None: the system's own choice."""
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        if shutil.disk_usage(SHARED_MEMORY).free >= LEAST_FREE:
            return SHARED_MEMORY
        print(f"{SHARED_MEMORY} is too small: chunks go through {tempfile.gettempdir()}", flush=True)
    return None


def _array_path(folder: Path, first: int, number: int) -> Path:
    return folder / f"{first}-{number}.npy"


def _work(job: tuple, index: Any, slots: Any, announced: Any, stop: Any) -> None:
    """A worker's life: take a slot, then the next index, render, write, announce.

    Slots before indices: the lowest index that is missing always has one, so ordered feeds cannot block.
    """
    make, chunk, end, folder = job
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends the workers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    while True:
        while not slots.acquire(timeout=PATIENCE):
            if stop.is_set() or not parent.is_alive():
                return
        with index.get_lock():
            first = index.value
            index.value = first + chunk
        if stop.is_set() or not parent.is_alive() or (end is not None and first >= end):
            return
        try:
            arrays = make(first, chunk if end is None else min(chunk, end - first))
            for number, values in enumerate(arrays.values()):
                np.save(_array_path(folder, first, number), values)
        except Exception:  # every failure is the parent's to raise
            announced.put((first, [], traceback.format_exc()))
            return
        announced.put((first, list(arrays), None))
