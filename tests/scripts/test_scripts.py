"""Every script and menu option runs on the miniature; every bad input ends in one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import check_environment
import example_end_to_end
import example_extraction
from qwen_vision_bridge.cli import run
from qwen_vision_bridge.specs import FAMILIES, TARGET_PX
from qwen_vision_bridge.synthetic.cases import GROUPS

ROOT = Path(__file__).parents[2]
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
QUICK = ["--models", "miniature", "--steps", "2", "--cases", "1", "--bridge", "random"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def session_of_examples(shared_pipe: Any) -> Callable[[list[str]], None]:
    """Run the end-to-end script with the pipeline that is loaded already; the rest is the script's own."""
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    def start(arguments: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EnhancedQwenImageEdit, "pipe", property(lambda self: use(self)))
            example_end_to_end.main(arguments)

    def use(editor: Any) -> Any:
        editor._pipe = shared_pipe
        return shared_pipe

    return start


def outcome(
    script: Callable[[Sequence[str] | None], int], arguments: list[str], capsys: Any
) -> tuple[int, str]:
    """Exit code and standard error of a script, run as its `__main__` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(script)
    return stopped.value.code, capsys.readouterr().err


def test_extraction_prints_the_promised_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example_extraction.main(["--models", "miniature"]) == 0
    out = capsys.readouterr().out
    family = FAMILIES["miniature"]
    tokens = (TARGET_PX // family.target.token_px) ** 2
    for line in (
        "Loading Qwen3-VL model...",
        "Qwen3-VL cache extracted successfully",
        f"  Early features: torch.Size([1, {tokens}, 256])",
        f"  Mid features: torch.Size([1, {tokens}, 256])",
        f"  Late features: torch.Size([1, {tokens}, 256])",
        "Loading Qwen2.5-VL model...",
        "Qwen2.5-VL cache extracted successfully",
        f"  Vision features: torch.Size([1, {tokens}, 224])",
        "Cache Comparison:",
        "  Vision token count match: True",
        "  Dimension mismatch: True",
        "  Dimension ratio: 1.14",
        "~5.2M",
    ):
        assert line in out
    assert (folder / "examples_output" / "test_input.png").is_file()


def test_extraction_takes_a_photograph(
    folder: Path, photo_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_extraction.main(["--models", "miniature", "--image", str(photo_file), "--prompt", "what?"])
    assert "torch.Size([1, 54, 256])" in capsys.readouterr().out  # 3:2 in at most 32² px, 4 px a token: 9×6
    assert not (folder / "examples_output" / "test_input.png").exists()


@pytest.mark.parametrize(
    ("example", "files"),
    [
        (1, ["test_input.png", "comparison_basic.png"]),
        (2, ["ocr_tests/results.json", "ocr_tests/summary.md"]),
        (3, ["spatial_tests/results.json", "spatial_tests/results.csv"]),
        (4, ["detail_tests/results.json"]),
        (
            5,
            [
                "full_evaluation/results.json",
                "full_evaluation/results.csv",
                "full_evaluation/summary.md",
                "full_evaluation/report.html",
            ],
        ),
        (6, ["attention_visualization.png"]),
    ],
)
def test_every_option_runs_and_writes_its_files(
    example: int, files: list[str], folder: Path, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session_of_examples([*QUICK, "--example", str(example)])
    assert all((folder / "examples_output" / file).is_file() for file in files)
    assert "Saved: examples_output" in capsys.readouterr().out
    if example == 5:
        written = json.loads((folder / "examples_output" / files[0]).read_text())
        assert {record["group"] for record in written["records"]} == set(GROUPS)


@pytest.mark.parametrize("example", [1, 2, 5, 6])
def test_options_take_the_users_photograph(
    example: int, folder: Path, photo_file: Path, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--image", str(photo_file), "--prompt", "HELLO"]
    session_of_examples([*QUICK, "--example", str(example), *asked])
    written = {
        1: "comparison_basic.png",
        2: "ocr_tests/report.html",
        5: "full_evaluation/report.html",
        6: "attention_visualization.png",
    }
    assert (folder / "examples_output" / written[example]).is_file()
    if example in (2, 5):
        results = (folder / "examples_output" / written[example]).with_name("results.json")
        records = json.loads(results.read_text(encoding="utf-8"))["records"]
        assert {record["arm"] for record in records} == {"baseline", "bridge"}
        assert all(record["error"] is None and record["read_before"] == "" for record in records)
        known = {
            "change_from_input",
            "text_kept",
            "drift_shift_px",
            "drift_scale_percent",
            "drift_rotation_deg",
        }
        assert all(
            {"change_from_input", "text_kept"} <= record["metrics"].keys() <= known for record in records
        )
        assert "not whether it is better" in capsys.readouterr().out


def test_cases_of_the_users_own_folder_go_through_the_script(
    folder: Path, photo: Image.Image, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own").mkdir()
    photo.save(folder / "own" / "a.png")
    photo.rotate(90).save(folder / "own" / "b.png")
    rows = [{"id": name, "image": f"{name}.png", "prompt": "make it blue"} for name in ("a", "b")]
    (folder / "own" / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    session_of_examples(
        [*QUICK, "--example", "5", "--case-folder", "own", "--batch-arms", "8", "--no-questions"]
    )
    records = json.loads((folder / "examples_output/full_evaluation/results.json").read_text())["records"]
    assert {record["case_id"] for record in records} == {"a", "b", "a+b"}
    assert {record["arm"] for record in records} == {"baseline", "bridge", "shuffled", "target-only"}
    assert "edits and 0 questions to do" in capsys.readouterr().out
    (folder / "own" / "cases.jsonl").write_text('{"id": "a"}')
    code, error = outcome(
        example_end_to_end.main, ["--models", "miniature", "--example", "5", "--case-folder", "own"], capsys
    )
    assert code == 2
    assert "cases.jsonl, line 1: the field 'image' is missing" in error.replace("\n", " ")


def test_the_menu_runs_what_is_chosen_and_quits(
    folder: Path,
    session_of_examples: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter(["x", "1", "", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    session_of_examples(QUICK)
    out = capsys.readouterr().out
    assert out.count("7. Run all") == 2
    assert "'x' is not on the menu" in out
    assert "'' is not on the menu" in out
    assert (folder / "examples_output" / "comparison_basic.png").is_file()


def test_run_all_does_all_six(folder: Path, session_of_examples: Any) -> None:
    session_of_examples([*QUICK, "--example", "7"])
    made = {path.name for path in (folder / "examples_output").iterdir()}
    assert made == {
        "test_input.png",
        "comparison_basic.png",
        "attention_visualization.png",
        "ocr_tests",
        "spatial_tests",
        "detail_tests",
        "full_evaluation",
    }


def test_the_environment_check_prints_and_returns_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_environment.main([]) == 0
    assert "Ready." in capsys.readouterr().out
    assert check_environment.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_the_environment_check_exits_1_with_a_remedy_where_nothing_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_vision_bridge import environment

    monkeypatch.setattr(environment, "_ram_gb", lambda: 0.1)
    assert check_environment.main([]) == 1
    assert "FAIL memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", [example_extraction.main, example_end_to_end.main], ids=["extract", "edit"]
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such image"),
        (b"", "is empty"),
        (b"nonsense", "not an image"),
        (b"\x89PNG\r\n\x1a\n\0\0", "png"),
    ],
)
def test_bad_images_exit_2_with_one_line_and_nothing_written(
    script: Any, content: bytes | None, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "given.png"
    if content is not None:
        path.write_bytes(content)
    code, error = outcome(script, ["--image", str(path), "--models", "miniature"], capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (folder / "examples_output").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--seed", "-1", "--example", "1"], "seed is -1"),
        (["--seed", str(2**64), "--example", "1"], "seed is 18446744073709551616"),
        (["--strength", "nan", "--example", "1"], "finite number"),
        (["--steps", "0", "--example", "1"], "num_inference_steps is a whole number from 2"),
        (["--source", "Qwen9-VL", "--example", "1"], "unknown source model 'Qwen9-VL'"),
        (["--source", ".", "--example", "1"], "has no config.json"),
        (["--editor", ".", "--example", "1"], "has no model_index.json"),
        (["--bridge", "/no/such/bridge", "--example", "1"], "neither a folder nor a hub id"),
        pytest.param(["--load-in-8bit", "--example", "1"], "needs a CUDA device", marks=WITHOUT_CUDA),
        pytest.param(["--offload", "model", "--example", "1"], "needs a CUDA device", marks=WITHOUT_CUDA),
    ],
)
def test_bad_arguments_exit_2_with_one_line(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = outcome(example_end_to_end.main, ["--models", "miniature", *arguments], capsys)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "examples_output").exists()


def test_small_and_extreme_images_exit_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, says in (((3, 3), "one vision token"), ((14 * 300, 14), "200:1")):
        Image.new("RGB", size).save(folder / "odd.png")
        code, error = outcome(
            example_extraction.main, ["--image", "odd.png", "--models", "miniature"], capsys
        )
        assert code == 2
        assert says in error


def test_released_models_without_network_or_cache_exit_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = outcome(example_extraction.main, ["--models", "qwen"], capsys)
    assert code == 2
    assert "hub cannot be reached" in error or "no processor could be loaded" in error


def test_debug_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", "--image", "absent.png", "--debug"])
        with pytest.raises(FileNotFoundError):
            run(example_extraction.main)


LOOK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    print("code", stopped.code)
print("imported", *[name for name in ("torch", "transformers", "diffusers") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "code", "imported"),
    [
        (["example_extraction.py", "--image", "absent.png"], 2, ""),
        (["example_end_to_end.py", "--image", "absent.png"], 2, ""),
        (["example_extraction.py", "--models", "miniature"], 0, "torch transformers"),
    ],
)
def test_a_command_imports_only_what_it_uses(
    arguments: list[str], code: int, imported: str, tmp_path: Path
) -> None:
    """A wrong path is answered before torch is imported, and extraction never imports diffusers."""
    script = [str(ROOT / arguments[0]), *arguments[1:]]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"code {code}" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"imported {imported}".strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qwen_vision_bridge; print({'torch', 'diffusers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_ctrl_c_in_the_middle_of_a_run_exits_130_and_the_next_run_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "example_end_to_end.py"),
        "--models",
        "miniature",
        "--example",
        "4",
        "--cases",
        "3",
        "--steps",
        "4",
        "--bridge",
        "random",
    ]
    log = tmp_path / "examples_output" / "detail_tests" / "results.jsonl"
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Files that were finished are kept" in errors
    assert "Traceback" not in errors
    kept = log.read_text().splitlines()
    assert 1 <= len(kept) < 30
    assert all(json.loads(line)["metrics"] for line in kept)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "edit        detail" in done.stdout
    assert f"{len(kept)} of" in done.stdout
    assert log.read_text().splitlines()[: len(kept)] == kept
