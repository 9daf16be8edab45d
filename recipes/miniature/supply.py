"""Flags and training data of the stages that show one or two images a prompt."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import peers
from .feed import Arrays, Feed, Render
from .loop import Settings

CHUNK = 1024  # items
PEER_ITEMS = 50_000_000  # between the first items of two peers
ENOUGH = 150_000  # items; above it chunks, which cost as much as some steps, are taken in more rarely
OFTEN, RARELY = 4, 24  # steps between two chunks
FIRST_CHUNKS = {1: 8, 2: 2}  # before training begins, by images a prompt


def stage_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that the stages share; `defaults` are the stage's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="checkpoint, log and results")
    add("--output", type=Path, help="folder of the finished model in stock layout")
    add("--start", help="a stock folder to start from instead of random weights")
    add("--steps", type=int, default=16_000)
    add("--minutes", type=float, help="stop training after so many minutes")
    add("--cosine-minutes", type=float, help="let the rate fall with time, not with steps")
    add("--batch", type=int, default=256)
    add("--learning-rate", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--workers", type=int, default=5, help="rendering processes; 0 renders in this one")
    add("--pool", type=int, default=400_000, help="items kept on the device")
    add("--first", type=int, default=0, help="index of the first item to render")
    add("--muon", type=float, default=0.0, help="Muon's rate in multiples of AdamW's; 0: AdamW alone")
    add("--two-every", type=int, default=10, help="every so many steps has two images a prompt; 0: none")
    add("--log-every", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-graphs", action="store_true", help="no CUDA graphs")
    add("--compile", action="store_true", help="torch.compile the blocks: slow start, then faster")
    parser.set_defaults(**defaults)
    return parser


def settings_of(arguments: argparse.Namespace, seed: int) -> Settings:
    """The loop's settings from a stage's flags."""
    names = ("steps", "learning_rate", "minutes", "cosine_minutes", "log_every", "weight_decay", "muon")
    return Settings(seed=seed, **{name: getattr(arguments, name) for name in names})


class Supply:
    """Random batches from feeds of prompts with one and with two images.

    Args:
        render: images a prompt → what a feed renders; picklable.
    """

    def __init__(self, arguments: argparse.Namespace, render: Callable[[int], Render]) -> None:
        self._stack = ExitStack()
        self.batch_size, self.two_every = arguments.batch, arguments.two_every
        self.device = peers.device_of(arguments.device)
        chunk = min(CHUNK, arguments.pool)
        workers, capacity = {1: arguments.workers}, {1: arguments.pool}
        if self.two_every:
            workers[2] = min(max(arguments.workers // 6, 1), arguments.workers)
            workers[1] = max(arguments.workers - workers[2], workers[2])
            capacity[2] = max(arguments.pool // 8, chunk)
        first = arguments.first + PEER_ITEMS * peers.rank()
        self.feeds = {
            shown: Feed(render(shown), chunk, workers[shown], capacity[shown], self.device, first)
            for shown in workers
        }

    def __enter__(self) -> Supply:
        for feed in self.feeds.values():
            self._stack.enter_context(feed)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def start(self, prepare: Callable[[Arrays], dict[str, np.ndarray | Tensor]] = dict) -> None:
        """Wait for the first items; `prepare` is applied to every chunk."""
        for shown, feed in self.feeds.items():
            feed.prepare = prepare
            feed.fill(FIRST_CHUNKS[shown] * CHUNK)

    def layouts(self) -> list[dict[str, Tensor]]:
        """One batch of each layout."""
        index = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        return [feed.pool.gather(index) for feed in self.feeds.values()]

    def batch(self, step: int) -> dict[str, Tensor]:
        """A random batch; every few steps a chunk of new items is taken in first."""
        for shown, feed in self.feeds.items():
            is_small = feed.pool.filled < min(ENOUGH // shown, feed.pool.capacity)
            if step % (OFTEN if is_small else RARELY) == 0:
                feed.refill()
        has_two = self.two_every and step % self.two_every == self.two_every - 1
        return self.feeds[2 if has_two else 1].pool.sample(self.batch_size)
