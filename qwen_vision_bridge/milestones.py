"""Checkpoints of a training run: folders that appear whole or not at all, and nothing pickled.

`checkpoint-<step>/` holds what was learnt in its own loadable form, `state.safetensors` with the exact
parameters, the optimiser's moments and their average, and `state.json`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .records import write_json
from .specs import read_json

NAME = re.compile(r"checkpoint-(\d+)")
STATE, TENSORS = "state.json", "state.safetensors"


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name))
    return sorted((path for path in found if (path / STATE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was saved after."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def save_checkpoint(
    folder: str | Path,
    step: int,
    write: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    limit: int | None = None,
) -> Path:
    """Write a checkpoint beside its place and rename it in; only then are the oldest beyond `limit` removed.

    Raises:
        OSError: it could not be written, a full disk say. Every earlier checkpoint is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"checkpoint-{step}"
    workshop = Path(tempfile.mkdtemp(prefix=f".checkpoint-{step}-", dir=folder))
    try:
        try:
            write(workshop)
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, workshop / TENSORS)
            write_json(workshop / STATE, {**state, "step": step})
        except (OSError, SafetensorError) as error:
            kept = checkpoints(folder)
            last = f"the last one is {kept[-1]}" if kept else "there is none before it"
            raise OSError(
                f"the checkpoint of step {step} could not be written ({error}); {last}: make room and go on "
                "with --resume_from_checkpoint latest"
            ) from error
        shutil.rmtree(place, ignore_errors=True)  # of a run that was resumed from before it
        os.chmod(workshop, 0o755)
        os.rename(workshop, place)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    for old in checkpoints(folder)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return place


def save_result(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, and move its files in once all are whole.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=".result-", dir=folder))
    try:
        write(workshop)
        for path in sorted(workshop.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def find_checkpoint(folder: str | Path, given: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, a name, or `latest`; None for none.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    if given is None:
        return None
    found = checkpoints(folder)
    if given == "latest":
        return found[-1] if found else None
    for path in (Path(given).expanduser(), Path(folder) / given):
        if (path / STATE).is_file():
            return path
    there = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(f"no checkpoint {given!r}; in {folder} there are: {there}")


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a checkpoint.

    Raises:
        OSError: damaged.
    """
    try:
        return read_json(checkpoint / STATE), load_file(checkpoint / TENSORS)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{checkpoint} is damaged ({error}): resume from another one") from error
