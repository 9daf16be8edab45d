"""Checkpoints of a training run: folders that appear whole or not at all, and nothing pickled.

`checkpoint-<step>/` holds the model in its own loadable form, `state.safetensors` with the exact parameters,
their average and the optimiser's moments, and `state.json`.
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

from ..io import read_json, usual_mode, write_json
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
    """Write a checkpoint into a temporary folder and rename it; then remove the oldest beyond `limit`.

    Raises:
        OSError: it could not be written, because the disk is full say. Earlier checkpoints stay.
        FileExistsError: another run has a checkpoint of this name.
    """
    path = run.folder / f"checkpoint-{step}"
    if os.path.lexists(path) and run_of(path) != run.run_id:
        raise FileExistsError(f"{path} is not of this run: move it away, then resume")
    temporary = run.temporary_folder() / path.name
    try:
        temporary.mkdir()
        write(temporary)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, temporary / TENSORS)
        for file in temporary.iterdir():
            usual_mode(file)
        data = {"run": run.run_id, "fingerprint": run.fingerprint, **state, "step": step}
        write_json(temporary / STATE, data)
        if path.exists():
            run.discard(path)  # the run was resumed from an earlier one
        os.rename(temporary, path)
    except (OSError, SafetensorError) as error:
        earlier = checkpoints(run.folder, run.run_id)
        last = f"the last one is {earlier[-1]}" if earlier else "there is none before it"
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}); {last}: make room and "
            "continue with --resume_from_checkpoint latest"
        ) from error
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    for old in checkpoints(run.folder, run.run_id)[: -limit if limit else 0]:
        run.discard(old)
    return path


def save_result(folder: str | Path, write: Callable[[Path], None], run: TrainingRun | None = None) -> None:
    """Let `write` fill a temporary folder, and move its files into `folder` once all are complete.

    Args:
        run: the owner of the files; None replaces any file.

    Raises:
        OSError: it could not be written; the folder is unchanged.
        FileExistsError: a file of that name exists and is not the run's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = run.temporary_folder() if run else Path(tempfile.mkdtemp(prefix=".result-", dir=folder))
    try:
        write(temporary)
        if run is not None:
            run.claim(*sorted(path.name for path in temporary.iterdir()))
        for path in sorted(temporary.iterdir()):
            usual_mode(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the state and tensors of a checkpoint.

    Raises:
        OSError: it is damaged.
    """
    try:
        return read_json(checkpoint / STATE), load_file(checkpoint / TENSORS)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{checkpoint} is damaged ({error}): resume from another one") from error
