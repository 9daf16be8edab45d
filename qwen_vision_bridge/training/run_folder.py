"""The run that a training folder belongs to, and which files in it are the run's own.

`run.json` holds the run's id and its files, each listed before it is written; every checkpoint carries the
id. Only listed files and checkpoints of the id are replaced or removed. Nothing heavy is imported.
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
from typing import Any

from ..io import first_difference, write_json
from ..specs import read_json

FORMAT = "qwen-vision-bridge/run/1"
RUN, STATE, LOG, ABOUT = "run.json", "state.json", "log.jsonl", "training.json"
RESULTS = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
)
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainingRun:
    """One training run in its folder."""

    folder: Path
    run_id: str
    fingerprint: dict[str, Any]
    """What makes it this run and no other: method, models, seed; plain data."""
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
        if data.get("format") != FORMAT or not all(map(_is_inside, data["files"])):
            raise ValueError(
                f"{path} is of another program or version (format {data.get('format')!r}, needed is "
                f"{FORMAT!r}): give another --output_dir"
            )
        return cls(Path(folder), data["run"], data["fingerprint"], data["files"])

    def write(self) -> None:
        """Write `run.json`."""
        data = {"format": FORMAT, "run": self.run_id, "fingerprint": self.fingerprint, "files": self.files}
        write_json(self.folder / RUN, data)

    def claim(self, *names: str) -> None:
        """List files as the run's own, before they are written.

        Raises:
            FileExistsError: one is there and not listed: it is somebody else's.
        """
        fresh = [name for name in names if name not in self.files]
        for name in fresh:
            if os.path.lexists(self.folder / name):
                raise FileExistsError(f"{self.folder / name} is not of this run: move it away, then resume")
        if fresh:
            self.files += fresh
            self.write()

    def workshop(self) -> Path:
        """A new hidden folder in the run's, known by its name as the run's own."""
        return Path(tempfile.mkdtemp(prefix=f".{self.run_id}-", dir=self.folder))

    def discard(self, folder: Path) -> None:
        """Remove a folder; a kill leaves it whole or out of sight, never half a checkpoint."""
        workshop = self.workshop()
        os.rename(folder, workshop / folder.name)
        shutil.rmtree(workshop, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed process of the run left half done."""
        for path in self.folder.glob(f".{self.run_id}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def tracker(self) -> str:
        """The name of the folder for a tracker's files."""
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
        shutil.rmtree(self.folder / self.tracker(), ignore_errors=True)
        self.sweep()


def checkpoints(folder: str | Path, run_id: str | None = None) -> list[Path]:
    """The checkpoints in a folder, oldest first: of one run, or of all."""
    found = [path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    found = [path for path in found if (path / STATE).is_file()]
    return sorted((path for path in found if run_id in (None, run_of(path))), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was saved after."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def run_of(checkpoint: Path) -> str:
    """The id of a checkpoint's run; "" where it carries none."""
    try:
        return str(read_json(checkpoint / STATE).get("run", ""))
    except (OSError, ValueError):
        return ""


def find_checkpoint(folder: str | Path, given: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, a name, or `latest`; None for none.

    `latest` is the last one of the run that the folder holds.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    if given is None:
        return None
    run = TrainingRun.read(folder)
    found = checkpoints(folder, run.run_id) if run is not None else []
    if given == "latest":
        return found[-1] if found else None
    for path in (Path(given).expanduser(), Path(folder) / given):
        if (path / STATE).is_file():
            return path
    there = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(f"no checkpoint {given!r}; in {folder} there are: {there}")


def check_output_dir(
    folder: str | Path,
    resume: str | None = None,
    overwrite: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    steps: int = 0,
) -> tuple[TrainingRun | None, Path | None]:
    """Refuse a folder in which a run would touch what is not its own; nothing is written.

    Args:
        resume: the checkpoint to continue from, see `find_checkpoint`.
        overwrite: a new run takes the place of the one that is there.
        fingerprint: what makes the run this one; None does not look at that.
        steps: up to which step the run writes checkpoints.

    Returns:
        The run that the folder holds, and the checkpoint to continue from.

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
    _refuse_clashes(folder, run, steps)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        _check_same_run(checkpoint, run, fingerprint)
    elif resume is not None and run is not None:
        _check_made_from(folder, run.fingerprint, fingerprint)
    return run, checkpoint


def open_run(
    folder: str | Path,
    accelerator: Any,
    fingerprint: Mapping[str, Any],
    resume: str | None = None,
    overwrite: bool = False,
    steps: int = 0,
) -> tuple[TrainingRun, Path | None]:
    """Start a run in a folder or continue the one there; the first process decides, and all get the same.

    Returns:
        The run, and the checkpoint to continue from.

    Raises:
        FileExistsError, ValueError, FileNotFoundError: as `check_output_dir`.
    """
    decided: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            decided = [_open(Path(folder), fingerprint, resume, overwrite, steps)]
        except (OSError, ValueError) as error:  # raised below, in every process
            decided = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(decided)
    if isinstance(decided[0], Exception):
        raise decided[0]
    return decided[0]


def _open(
    folder: Path, fingerprint: Mapping[str, Any], resume: str | None, overwrite: bool, steps: int
) -> tuple[TrainingRun, Path | None]:
    run, checkpoint = check_output_dir(folder, resume, overwrite, fingerprint, steps)
    if run is None or overwrite:
        if run is not None:
            run.remove()
        run_id = uuid.uuid4().hex[:12] if checkpoint is None else run_of(checkpoint)
        run = TrainingRun(folder, run_id, dict(fingerprint))
        run.write()
    run.sweep()
    return run, checkpoint


def _refuse_clashes(folder: Path, run: TrainingRun | None, steps: int) -> None:
    owned = [] if run is None else run.files
    clashes = [name for name in (LOG, ABOUT, *RESULTS) if name not in owned]
    run_id = None if run is None else run.run_id
    others = (path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name))
    clashes += sorted(path.name for path in others if step_of(path) <= steps and run_of(path) != run_id)
    for name in clashes:
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder} holds {name}, which is of no run that is known here: move it away, or give "
                "another --output_dir"
            )


def _check_same_run(checkpoint: Path, run: TrainingRun | None, fingerprint: Mapping[str, Any] | None) -> None:
    state = read_json(checkpoint / STATE)
    if not state.get("run"):
        raise ValueError(
            f"{checkpoint} is of an earlier version and carries no run's id: start a new run in another "
            f"--output_dir, from its bridge with --bridge {checkpoint}"
        )
    if run is not None and state["run"] != run.run_id:
        raise ValueError(f"{checkpoint} is not of the run in {run.folder}: give another --output_dir")
    _check_made_from(checkpoint, state["fingerprint"], fingerprint)


def _check_made_from(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    if wanted is not None and (difference := first_difference(found, wanted)):
        raise ValueError(
            f"{where} is of another run ({difference}): give the same flags, or start a new run in another "
            "--output_dir"
        )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
