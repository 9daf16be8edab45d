"""Command-line flags that the training stages share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


def stage_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags of every stage; `defaults` are the stage's own."""
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
    add("--batch", type=int, default=256, help="samples a step and process")
    add("--learning-rate", type=float, default=1e-3)
    add("--workers", type=int, default=5, help="rendering processes; 0 renders in this one")
    add("--pool", type=int, default=100_000, help="samples kept in memory, from which batches are drawn")
    add("--first", type=int, default=0, help="index of the first sample to render")
    add("--log-every", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the model's parts: slow start, then faster",
    )
    parser.set_defaults(**defaults)
    return parser


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of stages that show one or two images a prompt."""
    add = parser.add_argument
    add("--weight-decay", type=float, default=0.05)
    add("--muon", type=float, default=0.0, help="Muon's rate in multiples of AdamW's; 0: AdamW alone")
    add("--two-every", type=int, default=10, help="every so many steps has two images a prompt; 0: none")
