"""The training run that a folder belongs to, and which of the folder's files are its own.

`run.json` holds the run's id and its files, each listed before it is written; every checkpoint carries the
id. Only listed files and checkpoints of the id are replaced or removed. Torch is not imported.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..io import first_difference, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = "qwen-vision-bridge/run/1"
RUN, STATE, LOG, SUMMARY = "run.json", "state.json", "log.jsonl", "training.json"
MODEL_FILES = (
    *("README.md", "config.json", "model.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainingRun:
    """One training run in its folder."""

    folder: Path
    run_id: str
    fingerprint: dict[str, Any]
    """Values that only parts of the same run share, as plain data: method, models, seed."""
    files: list[str] = field(default_factory=list)
    """Its own files beside its checkpoints, as paths below the folder."""

    @classmethod
    def read(cls, folder: str | Path) -> TrainingRun | None:
        """The run that a folder holds, or None.

        Raises:
            ValueError: a `run.json` of another format.
        """
        path = Path(folder) / RUN
        if not os.path.lexists(path):
            return None
        data = read_json(path)
        paths = [PurePosixPath(name) for name in data["files"]]
        if data.get("format") != FORMAT or any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ValueError(
                f"{path} is of another program or version (format {data.get('format')!r}, needed is "
                f"{FORMAT!r}): give another --output_dir"
            )
        return cls(Path(folder), data["run"], data["fingerprint"], data["files"])

    def write(self) -> None:
        data = {"format": FORMAT, "run": self.run_id, "fingerprint": self.fingerprint, "files": self.files}
        write_json(self.folder / RUN, data)

    def claim(self, *names: str) -> None:
        """List files as the run's own, before they are written.

        Raises:
            FileExistsError: a file of that name exists and is not the run's.
        """
        new = [name for name in names if name not in self.files]
        for name in new:
            if os.path.lexists(self.folder / name):
                raise FileExistsError(f"{self.folder / name} is not of this run: move it away, then resume")
        if new:
            self.files += new
            self.write()

    def temporary_folder(self) -> Path:
        """Create a hidden folder in the run's; its name says whose it is."""
        return Path(tempfile.mkdtemp(prefix=f".{self.run_id}-", dir=self.folder))

    def discard(self, folder: Path) -> None:
        """Remove a folder in one rename, so that a kill never leaves half a checkpoint."""
        temporary = self.temporary_folder()
        os.rename(folder, temporary / folder.name)
        shutil.rmtree(temporary, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove the temporary folders of a killed process of the run."""
        for path in self.folder.glob(f".{self.run_id}-*"):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def tracker(self) -> str:
        """Name of the folder of a tracker's files."""
        return f"bridge-{self.run_id}"

    def remove(self) -> None:
        """Remove the run's checkpoints and files, and nothing else."""
        for checkpoint in checkpoints(self.folder, self.run_id):
            self.discard(checkpoint)
        for name in self.files:
            (self.folder / name).unlink(missing_ok=True)
        for parent in {self.folder / PurePosixPath(name).parent for name in self.files} - {self.folder}:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        shutil.rmtree(self.folder / self.tracker, ignore_errors=True)
        self.remove_leftovers()


def checkpoints(folder: str | Path, run_id: str | None = None) -> list[Path]:
    """The checkpoints in a folder, oldest first: of one run, or of all."""
    paths = [path for path in _checkpoint_folders(folder) if (path / STATE).is_file()]
    return sorted((path for path in paths if run_id in (None, run_of(path))), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def run_of(checkpoint: Path) -> str:
    """The id of a checkpoint's run; "" where it carries none."""
    try:
        return str(read_json(checkpoint / STATE).get("run", ""))
    except (OSError, ValueError):
        return ""


def find_checkpoint(folder: str | Path, name: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, a name, or `latest`; None for none.

    `latest` is the last one of the run that the folder holds.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    if name is None:
        return None
    run = TrainingRun.read(folder)
    own = checkpoints(folder, run.run_id) if run is not None else []
    if name == "latest":
        return own[-1] if own else None
    for path in (Path(name).expanduser(), Path(folder) / name):
        if (path / STATE).is_file():
            return path
    available = ", ".join(path.name for path in own) or "none"
    raise FileNotFoundError(f"no checkpoint {name!r}; in {folder} there are: {available}")


def check_output_dir(
    folder: str | Path,
    resume: str | None = None,
    overwrite: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    steps: int = 0,
) -> tuple[TrainingRun | None, Path | None]:
    """The run that a folder holds, and the checkpoint to continue from; nothing is written.

    Args:
        resume: the checkpoint to continue from, see `find_checkpoint`.
        overwrite: replace the run that the folder holds.
        fingerprint: of the run that starts; None leaves it unchecked.
        steps: the last step of which the run may write a checkpoint.

    Raises:
        FileExistsError: the folder holds another run, or files of no run.
        ValueError: the checkpoint is of another run; flags that exclude each other.
        FileNotFoundError: no such checkpoint.
    """
    if resume is not None and overwrite:
        raise ValueError(
            "--overwrite_output_dir starts a new run, --resume_from_checkpoint continues one: give one"
        )
    folder = Path(folder)
    run = TrainingRun.read(folder)
    if run is not None and resume is None and not overwrite:
        raise FileExistsError(
            f"{folder} holds another run ({run.run_id}): give another --output_dir, or continue it with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )
    _refuse_foreign_files(folder, run, steps)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        _check_same_run(checkpoint, run, fingerprint)
    elif resume is not None and run is not None:
        _check_fingerprint(folder, run.fingerprint, fingerprint)
    return run, checkpoint


def open_run(
    folder: str | Path,
    accelerator: Accelerator,
    fingerprint: Mapping[str, Any],
    resume: str | None = None,
    overwrite: bool = False,
    steps: int = 0,
) -> tuple[TrainingRun, Path | None]:
    """Start a run in a folder or continue the one there, as `check_output_dir`; the first process decides."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            run, checkpoint = check_output_dir(folder, resume, overwrite, fingerprint, steps)
            if run is None or overwrite:
                if run is not None:
                    run.remove()
                run_id = uuid.uuid4().hex[:12] if checkpoint is None else run_of(checkpoint)
                run = TrainingRun(Path(folder), run_id, dict(fingerprint))
                run.write()
            run.remove_leftovers()
            outcome = [(run, checkpoint)]
        except (OSError, ValueError) as error:  # raised below, in every process
            outcome = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _checkpoint_folders(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]


def _refuse_foreign_files(folder: Path, run: TrainingRun | None, steps: int) -> None:
    owned, run_id = ([], None) if run is None else (run.files, run.run_id)
    foreign = [name for name in (LOG, SUMMARY, *MODEL_FILES) if name not in owned]
    others = [path for path in _checkpoint_folders(folder) if run_of(path) != run_id]
    foreign += sorted(path.name for path in others if step_of(path) <= steps)
    for name in foreign:
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder} holds {name}, which no known run wrote: move it away, or give another --output_dir"
            )


def _check_same_run(checkpoint: Path, run: TrainingRun | None, fingerprint: Mapping[str, Any] | None) -> None:
    state = read_json(checkpoint / STATE)
    if not state.get("run"):
        raise ValueError(
            f"{checkpoint} carries no run's id: start a new run in another --output_dir, from its bridge "
            f"with --bridge {checkpoint}"
        )
    if run is not None and state["run"] != run.run_id:
        raise ValueError(f"{checkpoint} is not of the run in {run.folder}: give another --output_dir")
    _check_fingerprint(checkpoint, state["fingerprint"], fingerprint)


def _check_fingerprint(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any] | None) -> None:
    if current is not None and (difference := first_difference(saved, current)):
        raise ValueError(
            f"{path} is of another run ({difference}): give the same flags, or start a new run in another "
            "--output_dir"
        )
