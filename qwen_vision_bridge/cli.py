"""Common arguments of the scripts, errors in one line, quiet libraries."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import TextIOWrapper
from pathlib import Path

from PIL import Image

from .images import load_images
from .loading.families import resolve_family
from .loading.memory import is_out_of_memory
from .loading.registry import FAMILIES
from .specs import Family, check_prompt, check_seed

OUTPUT = Path("examples_output")
PHOTO_NOTE = "Note: the miniature was trained on synthetic scenes only; expect little of a photograph."
NO_MEMORY = (
    "the GPU ran out of memory: close other programs on it, give smaller images, or look at "
    "`check_environment.py` for a memory mode that fits"
)


def parser(description: str | None, prompt: str) -> argparse.ArgumentParser:
    """Build a parser with the arguments that every example takes."""
    common = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["auto", *sorted(FAMILIES)]
    common.add_argument("--models", default="auto", choices=models, help="family of models")
    common.add_argument("--source", help="another Qwen3-VL: registered name, hub id or local folder")
    common.add_argument(
        "--image",
        type=Path,
        action="append",
        help="your own image; of several the last one is edited, the others are references; "
        "default: a synthetic image",
    )
    common.add_argument("--prompt", default=None, help=f'instruction; default: "{prompt}"')
    common.add_argument("--seed", type=int, default=0, help="seed of noise and synthetic images, from 0")
    common.add_argument("--output", type=Path, default=OUTPUT, help="output folder")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return common


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's `main` and exit; 2 with one line for bad input, 130 after Ctrl-C."""
    quieten_libraries()
    gc.set_threshold(100_000)  # the libraries' imports make millions of objects: a fifth of their time
    for stream in (sys.stdout, sys.stderr):  # a console of another encoding gets `?` for what it cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    silent = open(os.devnull, "w") if os.environ.get("RANK", "0") != "0" else None  # noqa: SIM115
    try:
        with redirect_stdout(silent or sys.stdout):  # of several processes the first one prints
            code = main(None)
    except KeyboardInterrupt:
        print("\nStopped. Files that were finished are kept.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "--debug" in sys.argv or not is_out_of_memory(error):
            raise
        print(f"error: {NO_MEMORY}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def check_inputs(arguments: argparse.Namespace) -> None:
    """Refuse a bad image, prompt or seed before anything heavy is imported.

    Raises:
        ValueError, FileNotFoundError, OSError: what is wrong with it.
    """
    check_seed(arguments.seed)
    if arguments.image:
        smallest = min(family.target.token_px for family in FAMILIES.values())
        load_images(arguments.image, smallest)
    if arguments.prompt is not None:
        check_prompt(arguments.prompt)


def choose_models(arguments: argparse.Namespace) -> Family:
    """Choose the family and print why; its source, target and editor can be replaced by arguments."""
    from .environment import choose_family

    name, line = choose_family(arguments.models)
    replaced = {
        role: value for role in ("source", "target", "editor") if (value := getattr(arguments, role, None))
    }
    family = resolve_family(name, **replaced)
    print(line)
    if family.synthetic_only and arguments.image:
        print(PHOTO_NOTE)
    return family


def quieten_libraries() -> None:
    """Show warnings in one line, hide bars for files of a few MB, switch telemetry off."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qwen_vision_bridge.loading.towers").setLevel(logging.INFO)  # how many bytes were read
    logging.getLogger("qwen_vision_bridge.loading.memory").setLevel(logging.INFO)  # what will lie where
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `load_images` refuses such an image
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
