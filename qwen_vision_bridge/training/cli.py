"""The flags of `train_bridge.py`, named as in diffusers' training scripts, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..specs import FAMILIES, LEVEL_NAMES, resolve_family

METADATA = "metadata.jsonl"  # as in `samples`, which imports torch

if TYPE_CHECKING:
    from .config import TrainingSettings
    from .run import RunConfig


def parse(given: Sequence[str], description: str | None) -> argparse.Namespace:
    """The flags; `--train-batch-size` is `--train_batch_size`."""
    return _parser(description).parse_args([_underscored(word) for word in given])


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    """How to train.

    Raises:
        ValueError: a number out of its range.
    """
    from .config import TrainingSettings

    given = {item.name: getattr(arguments, item.name, None) for item in fields(TrainingSettings)}
    return TrainingSettings(**{name: value for name, value in given.items() if value is not None})


def run_config_of(arguments: argparse.Namespace) -> RunConfig:
    """What to train, from what; the data are looked at when the run is run.

    Raises:
        ValueError, FileNotFoundError, OSError: what is wrong with a flag, a model or a bridge.
        FileExistsError: `--output_dir` holds another run or somebody else's files.
    """
    _check_folder(arguments.train_data_dir)  # before torch is imported
    if not arguments.dry_run:
        from .run_folder import check_output_dir

        check_output_dir(
            arguments.output_dir, arguments.resume_from_checkpoint, arguments.overwrite_output_dir
        )
    from ..bridge import BridgeConfig, check_strength
    from ..shipped import resolve_bridge
    from .run import RunConfig

    if arguments.report_to == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ValueError(
            "--report_to tensorboard needs the package `tensorboard`, which is not installed: `uv run --with "
            "tensorboard python train_bridge.py …`; the figures are in log.jsonl anyway"
        )
    replaced = {role: getattr(arguments, role) for role in ("source", "target", "editor")}
    family = resolve_family(arguments.models, **replaced)
    changes = {
        "levels": tuple(arguments.levels),
        "blend": arguments.blend,
        **({"rank": arguments.rank, "query_dim": arguments.rank} if arguments.rank else {}),
    }
    names = (
        "method",
        "output_dir",
        "features",
        "rival",
        "teacher",
        "train_data_dir",
        "dataset_name",
        "max_train_samples",
        "validation_samples",
        "cache_dir",
        "dataloader_num_workers",
        "load_in_8bit",
        "gradient_checkpointing",
        "overwrite_output_dir",
    )
    return RunConfig(
        family=family,
        bridge=resolve_bridge(arguments.bridge, family)[0] if arguments.bridge else None,
        config=BridgeConfig.for_family(family, **changes),
        strength=check_strength(arguments.strength),
        **{name: getattr(arguments, name) for name in names},
    )


def _check_folder(folder: Path | None) -> None:
    if folder is not None and not (folder / METADATA).is_file():
        what = (
            f"{folder} has no {METADATA}" if folder.is_dir() else f"no such folder of training data: {folder}"
        )
        raise FileNotFoundError(
            f"{what}; a line of it has image, question, answer or image, instruction, target"
        )


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + sign + value


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_what(made.add_argument_group("what"))
    _add_data(made.add_argument_group("data"))
    _add_how(made.add_argument_group("how"))
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--models", choices=sorted(FAMILIES), default="miniature", help="which family")
    for role in ("source", "target", "editor"):
        group.add_argument(f"--{role}", help="another registered model, hub id or local folder for the role")
    group.add_argument(
        "--method",
        choices=["calibrate", "perceive", "edit", "perceive+edit"],
        default="perceive",
        help="by closed form, or by the loss of answers, of edits, or of both",
    )
    group.add_argument("--output_dir", type=Path, required=True, help="bridge, checkpoints and log")
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="replace the run that --output_dir holds; only its own checkpoints and files are removed",
    )
    group.add_argument("--bridge", help="continue from this bridge: folder or hub id")
    group.add_argument("--rank", type=int, help="of a new bridge; default: the family's")
    group.add_argument("--levels", nargs="+", choices=LEVEL_NAMES, default=LEVEL_NAMES)
    group.add_argument("--blend", choices=["add", "replace"], default="add", help="see BridgeConfig")
    group.add_argument(
        "--features",
        choices=["own", "shuffled", "target"],
        default="own",
        help="what the bridge sees; the others are controls",
    )
    group.add_argument("--rival", choices=["lora"], help="train a LoRA of the bridge's size instead")
    group.add_argument("--strength", type=float, default=1.0, help="of the update while training")
    group.add_argument("--teacher", action="store_true", help="calibrate: to the image seen finer")
    group.add_argument("--dry_run", action="store_true", help="print the plan and stop")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train_data_dir", type=Path, help="folder with metadata.jsonl, see samples.py")
    group.add_argument("--dataset_name", help="Hugging Face dataset with the same columns")
    group.add_argument("--max_train_samples", type=int)
    group.add_argument("--validation_samples", type=int, default=256)
    group.add_argument("--cache_dir", type=Path, help="where features are kept")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read images")


def _add_how(group: argparse._ArgumentGroup) -> None:
    from .config import SCHEDULES, TrainingSettings

    chosen = {"lr_scheduler": SCHEDULES}
    for item in fields(TrainingSettings):
        if item.type == "bool":
            group.add_argument(f"--{item.name}", action="store_true", default=None)
            continue
        kind = {"int": int, "float": float, "str": str, "int | None": int}[item.type]
        group.add_argument(
            f"--{item.name}", type=kind, choices=chosen.get(item.name), help=f"default: {item.default}"
        )
    group.add_argument("--mixed_precision", choices=["no", "bf16"], help="default: bf16 on CUDA")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, slower")
    group.add_argument("--load_in_8bit", action="store_true", help="the frozen models; needs CUDA")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="continue the run in --output_dir: path, name or `latest`",
    )
    group.add_argument("--report_to", choices=["tensorboard"], help="beside log.jsonl")
