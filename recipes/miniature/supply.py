"""What the stages with one or two images a prompt share: their flags, and data that fills up meanwhile."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import peers
from .feed import Feed, Pool
from .loop import Settings

Rows = dict[str, np.ndarray]
CHUNK = 1024  # items
PEER_ITEMS = 50_000_000  # between the first items of two peers
ENOUGH = 150_000  # items; from then on new ones, which cost as much as some steps, are taken in more rarely
OFTEN, RARELY = 4, 24  # steps from one taking in to the next
FIRST_CHUNKS = {1: 8, 2: 2}  # as many are there before training begins


def stage_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags of every such stage; `defaults` are the stage's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, log and results")
    parser.add_argument("--output", type=Path, help="the finished model in stock layout")
    parser.add_argument("--start", help="a stock folder to start from instead of random weights")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, help="stop training after as many")
    parser.add_argument("--cosine-minutes", type=float, help="let the rate fall with time, not with steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=5, help="rendering processes")
    parser.add_argument("--pool", type=int, default=400_000, help="items kept on the device")
    parser.add_argument("--first", type=int, default=0, help="index of the first item to render")
    parser.add_argument("--muon", type=float, default=0.0, help="times the rate for Muon; 0: AdamW alone")
    parser.add_argument("--two-every", type=int, default=10, help="every so many steps has two images")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the blocks: slow start, then faster"
    )
    parser.set_defaults(**defaults)
    return parser


def settings_of(arguments: argparse.Namespace, seed: int) -> Settings:
    """The loop's settings from a stage's flags."""
    names = ("steps", "learning_rate", "minutes", "cosine_minutes", "log_every", "weight_decay", "muon")
    return Settings(seed=seed, **{name: getattr(arguments, name) for name in names})


class Supply:
    """Rendered items on the device, by how many images they show, filled up while training runs.

    Args:
        make: images shown → (first index, count) → arrays; picklable.
    """

    def __init__(
        self, arguments: argparse.Namespace, make: Callable[[int], Callable[[int, int], Rows]]
    ) -> None:
        self.arguments, self.device = arguments, peers.device_of(arguments.device)
        chunk = min(CHUNK, arguments.pool)
        of_two = max(arguments.workers // 6, 1)
        workers = {1: max(arguments.workers - of_two, 1), 2: of_two}
        sizes = {1: arguments.pool, 2: max(arguments.pool // 8, chunk)}
        first = arguments.first + PEER_ITEMS * peers.rank()
        self.feeds = {n: Feed(make(n), chunk, workers[n], first=first) for n in (1, 2)}
        self.pools = {n: Pool(sizes[n], self.device) for n in (1, 2)}
        self._prepare: Callable[[Rows], dict[str, Any]] = dict

    def __enter__(self) -> Supply:
        for feed in self.feeds.values():
            feed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for feed in self.feeds.values():
            feed.__exit__(*error)

    def start(self, prepare: Callable[[Rows], dict[str, Any]] = dict) -> None:
        """Wait for the first items; `prepare` is what becomes of a chunk before it is kept."""
        self._prepare = prepare
        for shown, pool in self.pools.items():
            while pool.filled < min(pool.capacity, FIRST_CHUNKS[shown] * CHUNK):
                pool.add(prepare(self.feeds[shown].poll(block=True)[1]))

    def layouts(self) -> list[dict[str, Tensor]]:
        """A batch of every kind that `batch` gives."""
        kinds = (1, 2) if self.arguments.two_every else (1,)
        first = torch.zeros(self.arguments.batch, dtype=torch.long, device=self.device)
        return [self.pools[shown].gather(first) for shown in kinds]

    def batch(self, step: int) -> dict[str, Tensor]:
        """A random batch; now and then new items are taken in first."""
        for shown, feed in self.feeds.items():
            often = self.pools[shown].filled < min(ENOUGH // shown, self.pools[shown].capacity)
            if step % (OFTEN if often else RARELY) == 0 and (chunk := feed.poll()) is not None:
                self.pools[shown].add(self._prepare(chunk[1]))
        every = self.arguments.two_every
        pool = self.pools[2 if every and step % every == every - 1 else 1]
        return pool.gather(torch.randint(pool.filled, (self.arguments.batch,), device=self.device))
