"""Arguments of a command line that runs edits and an evaluation of them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_evaluation_options(options: argparse.ArgumentParser) -> None:
    """Add what an evaluation takes, in examples 2 to 5."""
    options.add_argument(
        "--cases",
        type=int,
        help="synthetic cases a group in examples 2 to 5; default: enough "
        "to see 5 points in example 5, else 4",
    )
    options.add_argument(
        "--quick", action="store_true", help="2 cases a group, few steps: shows that all runs"
    )
    options.add_argument(
        "--case-folder", type=Path, help="cases of your own for example 5, see docs/evaluation.md"
    )
    options.add_argument(
        "--layout", default="own", help="of that folder: own, textedit, textedit-full, pie, gedit or gedit-cn"
    )
    options.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=BRIDGE[,…]",
        help="an arm beside the baseline, with strength=, site=, features=own|shuffled|target, "
        "lora=FILE:WEIGHT; `none` is no bridge; may be repeated; default: the bridge and its two controls",
    )
    options.add_argument(
        "--batch-arms",
        type=int,
        default=1,
        metavar="N",
        help="edits denoised together; above "
        "1 faster on a GPU, and close to the same images but not the same bits",
    )
    options.add_argument("--workers", type=int, default=0, metavar="N", help="processes that measure images")
    options.add_argument(
        "--no-questions", action="store_true", help="edits alone: the language model is not asked"
    )
    options.add_argument("--retry-errors", action="store_true", help="do again what failed in an earlier run")


def add_edit_options(options: argparse.ArgumentParser) -> None:
    """Add what decides an edit."""
    options.add_argument("--editor", help="another Qwen-Image-Edit: registered name, hub id or local folder")
    options.add_argument("--example", type=int, choices=range(1, 8), help="which example; without it, a menu")
    options.add_argument(
        "--bridge", help="folder or hub id of a bridge, `fresh` or `random`; default: the family's own"
    )
    options.add_argument(
        "--strength", type=float, default=1.0, help="strength of the bridge; 0 is the stock pipeline"
    )
    options.add_argument("--steps", type=int, help="denoising steps; default: the family's")
    options.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA for baseline and enhanced edits: a safetensors file of any trainer, a folder, a hub "
        "id, or owner/name/file.safetensors; may be repeated",
    )
    options.add_argument(
        "--fast",
        type=int,
        choices=(4, 8),
        help="edit in so many steps without guidance, by the editor's few-step LoRA",
    )
    options.add_argument("--fast-lora", metavar="FILE", help="another few-step LoRA, for --fast")
    options.add_argument("--load-in-8bit", action="store_true", help="quantise to 8 bits (CUDA)")
    options.add_argument("--load-in-4bit", action="store_true", help="quantise to 4 bits (CUDA)")
    options.add_argument(
        "--offload", choices=["model", "group", "sequential"], help="keep weights in CPU memory (CUDA)"
    )
