"""Flags of `train_bridge.py`, named as in diffusers' training scripts where those have them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from ..loading.families import resolve_family
from ..loading.registry import FAMILIES
from ..specs import LEVEL_NAMES
from .config import Control, Method, RunConfig, Schedule, TrainingSettings, check_data_folder


def parse(arguments: Sequence[str], description: str | None) -> argparse.Namespace:
    """Parse the flags; `--train-batch-size` is `--train_batch_size`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_run(parser.add_argument_group("run"))
    _add_bridge(parser.add_argument_group("bridge"))
    _add_data(parser.add_argument_group("data"))
    _add_settings(parser.add_argument_group("training"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(
        [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in arguments]
    )


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    """How to train.

    Raises:
        ValueError: a number out of its range.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)}
    return TrainingSettings(**{name: value for name, value in values.items() if value is not None})


def run_config_of(arguments: argparse.Namespace) -> RunConfig:
    """What to train, from which data; the samples are checked when the run starts.

    Raises:
        ValueError, FileNotFoundError, OSError: a wrong flag, model, bridge or data folder.
        FileExistsError: `--output_dir` holds another run or foreign files.
    """
    if arguments.train_data_dir is not None:  # the cheap checks come before torch is imported
        check_data_folder(arguments.train_data_dir)
    if not arguments.dry_run:
        from .run_folder import check_output_dir

        check_output_dir(
            arguments.output_dir, arguments.resume_from_checkpoint, arguments.overwrite_output_dir
        )
    if arguments.report_to == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ValueError(
            "--report_to tensorboard needs the package `tensorboard`, which is not installed: `uv run --with "
            "tensorboard python train_bridge.py …`; the figures are in log.jsonl anyway"
        )
    from ..bridge import BridgeConfig, check_strength, resolve_bridge

    models = {role: getattr(arguments, role) for role in ("source", "target", "editor")}
    family = resolve_family(arguments.models, **models)
    changes = {"levels": tuple(arguments.levels), "blend": arguments.blend}
    if arguments.rank:
        changes |= {"rank": arguments.rank, "query_dim": arguments.rank}
    names = {field.name for field in fields(RunConfig)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}  # as they are
    flags |= {
        "family": family,
        "bridge": resolve_bridge(arguments.bridge, family)[0] if arguments.bridge else None,
        "config": BridgeConfig.for_family(family, **changes),
        "strength": check_strength(arguments.strength),
        "lora_baseline": arguments.lora_baseline == "lora",
    }
    return RunConfig(**flags)


def _add_run(group: argparse._ArgumentGroup) -> None:
    add, switch = group.add_argument, partial(group.add_argument, action="store_true")
    methods = get_args(Method)
    add("--models", choices=sorted(FAMILIES), default="miniature", help="model family")
    for role in ("source", "target", "editor"):
        add(f"--{role}", help="another registered model, hub id or local folder for this role")
    add("--method", choices=methods, default="perceive", help="closed form, or the loss to train with")
    add("--output_dir", type=Path, required=True, help="folder of bridge, checkpoints and log")
    switch("--overwrite_output_dir", help="replace the run in --output_dir; only its own files are removed")
    resume = "continue the run in --output_dir: path, name or `latest`"
    add("--resume_from_checkpoint", metavar="CHECKPOINT", help=resume)
    switch("--dry_run", help="print the plan and stop")


def _add_bridge(group: argparse._ArgumentGroup) -> None:
    add, controls = group.add_argument, get_args(Control)
    add("--bridge", help="continue from this bridge: folder or hub id")
    add("--rank", type=int, help="rank of a new bridge; default: the family's")
    add("--levels", nargs="+", choices=LEVEL_NAMES, default=LEVEL_NAMES, help="source levels of a new bridge")
    add("--blend", choices=["add", "replace"], default="add", help="see BridgeConfig")
    features = "what the bridge sees; `shuffled` and `target` are controls"
    add("--features", choices=controls, default="own", help=features)
    add("--rival", choices=["lora"], dest="lora_baseline", help="train a LoRA of the bridge's size instead")
    add("--strength", type=float, default=1.0, help="strength of the update while training")
    teacher = "calibrate to the target's features of the image at a higher resolution"
    add("--teacher", action="store_true", dest="highres_target", help=teacher)


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--train_data_dir", type=Path, help="folder with metadata.jsonl, see training/data.py")
    add("--dataset_name", help="Hugging Face dataset with the same columns")
    add("--max_train_samples", type=int, help="default: all of the data, 12000 of the synthetic world")
    add("--validation_samples", type=int, default=256, help="samples to hold out, at most")
    add("--cache_dir", type=Path, help="folder of cached features")
    add("--dataloader_num_workers", type=int, default=0, help="processes that read images")


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for field in fields(TrainingSettings):
        flag, help_text = f"--{field.name}", f"default: {field.default}"
        if field.type == "bool":
            add(flag, action="store_true", default=None)
        elif field.type == "Schedule":
            add(flag, choices=get_args(Schedule), help=help_text)
        else:
            add(flag, type=float if field.type == "float" else int, help=help_text)
    add("--mixed_precision", choices=["no", "bf16"], help="default: bf16 on CUDA")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower")
    add("--load_in_8bit", action="store_true", help="quantise the frozen models; needs CUDA")
    add("--report_to", choices=["tensorboard"], help="tracker beside log.jsonl")
