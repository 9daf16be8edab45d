"""Checkpoints of a training run: folders that appear whole or not at all, and nothing pickled.

`checkpoint-<step>/` holds what was learnt in its own loadable form, `state.safetensors` with the exact
parameters, the optimiser's moments and their average, and `state.json`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..io import write_json
from ..specs import read_json
from .run_folder import STATE, TrainingRun, checkpoints, run_of

TENSORS = "state.safetensors"


def save_checkpoint(
    run: TrainingRun,
    step: int,
    write: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    limit: int | None = None,
) -> Path:
    """Write a checkpoint beside its place and rename it in; then remove the run's oldest beyond `limit`.

    Raises:
        OSError: it could not be written, a full disk say. Every earlier checkpoint is still there.
        FileExistsError: another run's is in its place.
    """
    place = run.folder / f"checkpoint-{step}"
    if os.path.lexists(place) and run_of(place) != run.run_id:
        raise FileExistsError(f"{place} is not of this run: move it away, then resume")
    workshop = run.workshop() / place.name
    try:
        try:
            workshop.mkdir()
            write(workshop)
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, workshop / TENSORS)
            about = {"run": run.run_id, "fingerprint": run.fingerprint, **state, "step": step}
            write_json(workshop / STATE, about)
        except (OSError, SafetensorError) as error:
            kept = checkpoints(run.folder, run.run_id)
            last = f"the last one is {kept[-1]}" if kept else "there is none before it"
            raise OSError(
                f"the checkpoint of step {step} could not be written ({error}); {last}: make room and go on "
                "with --resume_from_checkpoint latest"
            ) from error
        if place.exists():
            run.discard(place)  # the run was resumed from before it
        os.rename(workshop, place)
    finally:
        shutil.rmtree(workshop.parent, ignore_errors=True)
    for old in checkpoints(run.folder, run.run_id)[: -limit if limit else 0]:
        run.discard(old)
    return place


def save_result(folder: str | Path, write: Callable[[Path], None], run: TrainingRun | None = None) -> None:
    """Let `write` fill a folder beside, and move its files in once all are whole.

    Args:
        run: whose files they are; None replaces what is there.

    Raises:
        OSError: it could not be written; what was there is as it was.
        FileExistsError: a file of that name is there and not the run's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    workshop = run.workshop() if run else Path(tempfile.mkdtemp(prefix=".result-", dir=folder))
    try:
        write(workshop)
        if run is not None:
            run.claim(*sorted(path.name for path in workshop.iterdir()))
        for path in sorted(workshop.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a checkpoint.

    Raises:
        OSError: damaged.
    """
    try:
        return read_json(checkpoint / STATE), load_file(checkpoint / TENSORS)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{checkpoint} is damaged ({error}): resume from another one") from error
