"""Training batches rendered by a DataLoader's workers, which draw most of them from what they have rendered.

Rendering a sample costs more than training on it, so every worker keeps its last samples and draws several
random batches for each one that it renders.
"""

from __future__ import annotations

import argparse
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

if TYPE_CHECKING:
    from accelerate import Accelerator

Arrays = dict[str, np.ndarray]
Render = Callable[[int, int], Arrays]
"""(first index, count) → arrays of leading dimension count; picklable, so of a module's top level."""
Batches = Callable[[int], dict[str, Tensor]]
"""Step → tensors on the device."""
DRAWS = 6  # batches drawn for each one rendered
PROCESS_SAMPLES = 50_000_000  # between the first samples of two training processes


class Replay(IterableDataset):
    """Endless random batches of the samples that this worker rendered last.

    Args:
        batch: samples in a batch. capacity: samples kept by all workers together.
        first: index of the first sample. draws: batches drawn for each one rendered.
    """

    def __init__(self, render: Render, batch: int, capacity: int, first: int = 0, draws: int = DRAWS) -> None:
        self.render, self.batch, self.capacity, self.first, self.draws = render, batch, capacity, first, draws

    def __iter__(self) -> Iterator[Arrays]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        kept = max(self.capacity // workers // self.batch, 1)
        rng = np.random.default_rng([self.first, number])
        chunks: deque[Arrays] = deque(maxlen=kept)
        for turn in range(number, 2**62, workers):
            chunks.append(self.render(self.first + turn * self.batch, self.batch))
            for _ in range(self.draws):
                yield _drawn(chunks, self.batch, rng)


def _drawn(chunks: Sequence[Arrays], count: int, rng: np.random.Generator) -> Arrays:
    """Random samples of equally large chunks, with replacement."""
    size = len(next(iter(chunks[0].values())))
    picks = [divmod(int(pick), size) for pick in rng.integers(len(chunks) * size, size=count)]
    return {name: np.stack([chunks[chunk][name][row] for chunk, row in picks]) for name in chunks[0]}


def loader(dataset: IterableDataset, workers: int) -> DataLoader[Any]:
    """The dataset's batches, rendered ahead by so many processes; with 0 each is rendered when asked for.

    Batches stay numpy arrays: those go through pipes, while tensors need shared memory, of which containers
    often have only 64 MB.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy an unusable CUDA context
        worker_init_fn=_ignore_interrupts,
    )


def _unchanged(batch: Arrays) -> Arrays:
    return batch


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def to_device(batch: Arrays, device: torch.device) -> dict[str, Tensor]:
    """A batch as tensors on a device."""
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}


def alternating(
    render: Callable[[int], Render], arguments: argparse.Namespace, accelerator: Accelerator
) -> Batches:
    """Batches of prompts with one image, and every `--two-every` steps of prompts with two.

    Args:
        render: images a prompt → what renders them.
    """
    batch, workers, two_every = arguments.batch, arguments.workers, arguments.two_every
    for_two = min(max(workers // 6, 1), workers) if two_every else 0
    shares = {1: (arguments.pool, max(workers - for_two, for_two))}
    if two_every:
        shares[2] = arguments.pool // 8, for_two
    first = arguments.first + PROCESS_SAMPLES * accelerator.process_index
    streams = {
        shown: iter(loader(Replay(render(shown), batch, kept, first), processes))
        for shown, (kept, processes) in shares.items()
    }

    def next_batch(step: int) -> dict[str, Tensor]:
        has_two = bool(two_every) and step % two_every == two_every - 1
        return to_device(next(streams[2 if has_two else 1]), accelerator.device)

    return next_batch
