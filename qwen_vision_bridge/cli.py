"""What the scripts share: common arguments, errors in one line, quiet libraries."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from .images import load_images
from .loading.memory import is_out_of_memory
from .specs import FAMILIES, Family, check_seed, resolve_family

OUTPUT = Path("examples_output")
NO_MEMORY = (
    "the GPU ran out of memory: close other programs on it, give smaller images, or look at "
    "`check_environment.py` for a memory mode that fits"
)
PHOTO_NOTE = "Note: the miniature knows only its own synthetic world; of a photograph it makes little."


def parser(description: str | None, prompt: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every example takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--models", default="auto", choices=["auto", *sorted(FAMILIES)], help="which family to use"
    )
    made.add_argument("--source", help="another Qwen3-VL: registered name, hub id or local folder")
    made.add_argument("--image", type=Path, help="your own image; default: a synthetic test image")
    made.add_argument("--prompt", default=None, help=f'what to do with it; default: "{prompt}"')
    made.add_argument("--seed", type=int, default=0, help="of noise and synthetic images, from 0")
    made.add_argument("--output", type=Path, default=OUTPUT, help="folder for what is written")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's `main` and exit: 2 with one line for bad input, 130 after Ctrl-C."""
    quieten_libraries()
    silent = open(os.devnull, "w") if os.environ.get("RANK", "0") != "0" else None  # noqa: SIM115
    try:
        with redirect_stdout(silent or sys.stdout):  # of several processes the first one speaks
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
    if arguments.image is not None:
        smallest = min(family.target.token_px for family in FAMILIES.values())
        load_images(arguments.image, smallest)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError("the prompt is empty: say what to change")


def choose_models(arguments: argparse.Namespace) -> Family:
    """Print which family is used, why, and how to get the other; return it with its replaced roles."""
    from .environment import choose_family

    name, line = choose_family(arguments.models)
    replaced = {
        role: value for role in ("source", "target", "editor") if (value := getattr(arguments, role, None))
    }
    family = resolve_family(name, **replaced)
    print(line)
    if name == "miniature" and arguments.image is not None:
        print(PHOTO_NOTE)
    return family


def quieten_libraries() -> None:
    """Leave the screen to the script: warnings in one line, no bars for files of a few MB, no telemetry."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qwen_vision_bridge.loading.towers").setLevel(logging.INFO)  # how many bytes were read
    logging.getLogger("qwen_vision_bridge.loading.placement").setLevel(logging.INFO)  # what will lie where
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
