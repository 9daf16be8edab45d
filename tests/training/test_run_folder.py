"""A training folder belongs to one run: others are refused, and what is not the run's own stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_bridge

from .test_train_bridge import refused

FLAGS = [
    *("--max_train_samples", "6", "--validation_samples", "5", "--train_batch_size", "3"),
    *("--log_every", "1", "--checkpointing_steps", "1"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of three steps, and the flag of its features."""
    root = tmp_path_factory.mktemp("runs")
    packs = ["--cache_dir", str(root / "packs")]
    train_bridge.main([*FLAGS, *packs, "--max_train_steps", "3", "--output_dir", str(root / "first")])
    return root / "first", packs


@pytest.fixture
def used(places: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(places[0], tmp_path / "run"))


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model would be loaded."""
    monkeypatch.setattr(
        "qwen_vision_bridge.training.run.FrozenModels", lambda *_: pytest.fail("models were loaded")
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run_id(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["run"]


def steps(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "lr" in row]


def foreign_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of some other run in a folder."""
    made = Path(shutil.copytree(folder / "checkpoint-3", folder / f"checkpoint-{step}"))
    state = json.loads((made / "state.json").read_text())
    (made / "state.json").write_text(json.dumps({**state, "run": "another"}))
    return made


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_train_steps", "2", "--seed", "7"], "holds another run"),
        (["--method", "calibrate"], "holds another run"),
        (["--method", "calibrate", "--resume_from_checkpoint", "latest"], "a calibration has no checkpoints"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], "give one"),
        (["--resume_from_checkpoint", "latest", "--seed", "7"], "of another run (seed 0, now 7)"),
        (["--resume_from_checkpoint", "latest", "--method", "edit"], "of another run (method 'perceive'"),
        (["--resume_from_checkpoint", "latest", "--blend", "replace"], "of another run (blend 'add'"),
        (["--resume_from_checkpoint", "checkpoint-3", "--max_train_samples", "5"], "(max_train_samples 6"),
    ],
)
@pytest.mark.usefixtures("no_models")
def test_another_run_in_a_used_folder_is_refused(
    flags: Sequence[str], says: str, used: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(used)
    assert says in refused([*FLAGS, "--output_dir", str(used), *flags], capsys)
    assert contents(used) == before


def test_overwriting_removes_the_runs_own_files_alone(used: Path, places: tuple[Path, list[str]]) -> None:
    mine = ["notes.txt", "samples/mine.png", "checkpoint-old/a"]
    for name in mine:
        (used / name).parent.mkdir(exist_ok=True)
        (used / name).write_text("mine")
    foreign = contents(foreign_checkpoint(used, 99))
    first = run_id(used)
    flags = ["--max_train_steps", "2", "--seed", "7", "--overwrite_output_dir"]
    train_bridge.main([*FLAGS, *places[1], "--output_dir", str(used), *flags])
    assert run_id(used) != first
    assert sorted(path.name for path in used.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-99",
        "checkpoint-old",
    ]
    assert steps(used) == [1, 2]
    assert contents(used / "checkpoint-99") == foreign
    assert all((used / name).read_text() == "mine" for name in mine)


def test_a_run_resumes_its_own_last_checkpoint_and_keeps_its_id(
    used: Path, places: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's later checkpoint is neither resumed nor counted nor removed; what changed is said."""
    foreign, first = foreign_checkpoint(used, 99), run_id(used)
    (used / f".{first}-left").mkdir()  # by a kill
    flags = ["--max_train_steps", "4", "--resume_from_checkpoint", "latest"]
    train_bridge.main([*FLAGS, *places[1], "--output_dir", str(used), *flags])
    assert "resumed with other settings: max_train_steps 3 → 4" in capsys.readouterr().out
    assert run_id(used) == first
    assert steps(used) == [1, 2, 3, 4]
    kept = {path.name for path in used.glob("checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-4", foreign.name}
    assert json.loads((used / "checkpoint-4" / "state.json").read_text())["run"] == first
    assert not list(used.glob(".*"))


@pytest.mark.parametrize(
    "name", ["log.jsonl", "model.safetensors", "training.json", "checkpoint-2/a", "run.json"]
)
@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]])
@pytest.mark.usefixtures("no_models")
def test_files_of_no_run_are_refused_and_stay(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"files": []}')
    error = refused([*FLAGS, "--output_dir", str(tmp_path), *flags], capsys)
    assert Path(name).parts[0] in error
    assert "another --output_dir" in error
    assert contents(tmp_path) == {name: b'{"files": []}'}


@pytest.mark.usefixtures("no_models")
def test_a_checkpoint_without_a_runs_id_is_not_resumed(
    used: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version wrote it; its bridge can still be continued from."""
    path = used / "checkpoint-3" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: state[key] for key in ("settings", "trained", "step")}))
    flags = ["--resume_from_checkpoint", str(path.parent), "--output_dir", str(tmp_path / "new")]
    assert f"--bridge {path.parent}" in refused([*FLAGS, *flags], capsys)


@pytest.mark.usefixtures("no_models")
def test_another_folders_run_is_not_resumed_over_this_one(
    used: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = foreign_checkpoint(used, 9)
    flags = ["--resume_from_checkpoint", foreign.name, "--output_dir", str(used)]
    assert "is not of the run in" in refused([*FLAGS, *flags], capsys)


def test_a_run_goes_on_in_an_empty_folder_under_its_id(used: Path, tmp_path: Path) -> None:
    from qwen_vision_bridge.training.run_folder import open_run

    alone: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    fingerprint = json.loads((used / "run.json").read_text())["fingerprint"]
    run, found = open_run(tmp_path / "new", alone, fingerprint, str(used / "checkpoint-2"))
    assert run.run_id == run_id(used) == run_id(tmp_path / "new")
    assert found == used / "checkpoint-2"


def test_a_run_lists_its_files_and_no_path_outside(used: Path, tmp_path: Path) -> None:
    """What a file that was tampered with names is not removed."""
    data = json.loads((used / "run.json").read_text())
    own = {path.name for path in used.iterdir() if path.is_file()} - {"run.json"}
    assert set(data["files"]) == own
    (tmp_path / "precious").write_text("mine")
    (used / "run.json").write_text(json.dumps({**data, "files": ["../precious"]}))
    with pytest.raises(ValueError, match=r"run\.json"):
        train_bridge.main([*FLAGS, "--output_dir", str(used), "--overwrite_output_dir"])
    assert (tmp_path / "precious").exists()


@pytest.mark.usefixtures("no_models")
def test_a_used_folder_may_be_planned_for(used: Path) -> None:
    assert train_bridge.main([*FLAGS, "--output_dir", str(used), "--dry_run"]) == 0
