"""Every script and menu option runs on the miniature; every bad input ends in one line and exit code 2."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import check_environment
import example_end_to_end
import example_extraction
from qwen_vision_bridge.cli import run
from qwen_vision_bridge.evaluation.report.tables import OUTSIDE
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.specs import TARGET_PX, Family
from qwen_vision_bridge.synthetic.cases import GROUPS
from tests.conftest import SMALL, STOCK

TINY = replace(SMALL, image_size=64)
ROOT = Path(__file__).parents[2]
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
FILES = [
    "comparison_basic.png",
    "full_evaluation/results.json",
    "full_evaluation/results.csv",
    "full_evaluation/summary.md",
    "full_evaluation/report.html",
    "full_evaluation/overview.png",
    "attention_visualization.png",
]
QUICK = ["--models", "miniature", "--steps", "2", "--cases", "1", "--bridge", "random"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def session_of_examples(shared_pipe: Any) -> Callable[..., None]:
    """Run the end-to-end script with the pipeline that is loaded already, by default on images of 64² px."""
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    def start(arguments: list[str], family: Family = TINY) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FAMILIES, "miniature", family)
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


def test_extraction_prints_the_promised_lines(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(folder / "home"))
    arguments = ["--models", "miniature"]
    with caplog.at_level(logging.INFO, "qwen_vision_bridge.loading.towers"):
        assert example_extraction.main(arguments) == 0
        out = capsys.readouterr().out + caplog.text
        caplog.clear()
        assert example_extraction.main(arguments) == 0
    assert "Loading" not in capsys.readouterr().out + caplog.text  # nothing was loaded
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


def test_a_number_runs_its_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    session = example_end_to_end.Session
    monkeypatch.setattr(session, "basic_comparison", lambda self: ran.append("basic"))
    monkeypatch.setattr(session, "attention", lambda self: ran.append("attention"))
    monkeypatch.setattr(session, "evaluate", lambda self, groups, output, quick: ran.append(output))
    for number in range(1, 7):
        example_end_to_end.main([*QUICK, "--example", str(number)])
    evaluations = ["ocr_tests", "spatial_tests", "detail_tests", "full_evaluation"]
    assert ran == ["basic", *evaluations, "attention"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--example", "5", "--case-folder", "x", "--image", "a.png"], "give one of them"),
        (["--example", "1", "--case-folder", "x"], "examples 2 to 5"),
        (["--example", "6", "--arm", "r=random"], "examples 2 to 5"),
        (["--example", "6", "--image", "a.png", "--image", "a.png"], "one --image"),
        (["--example", "1", "--lora", "absent.safetensors:0.5"], "absent.safetensors"),
        (["--example", "1", "--lora", "a.pt"], "pickled"),
        (["--example", "1", "--fast", "8"], "no LoRA for 8 steps"),
        (["--example", "5", "--arm", "x=none,lora=absent.safetensors"], "absent.safetensors"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    folder: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    code, error = outcome(example_end_to_end.main, ["--models", "miniature", *arguments], capsys)
    assert code == 2
    assert says in error


def test_loras_of_a_command_line_are_loaded(folder: Path) -> None:
    """Each with its weight, for both arms; a quick evaluation then keeps to that pipeline."""
    name = "transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 192), f"{name}.lora_B.weight": torch.ones(192, 1)}
    for file in ("one", "two"):
        save_file(tensors, folder / f"{file}.safetensors")
    arguments = ["--models", "miniature", "--lora", "one.safetensors:0.5", "--lora", "two.safetensors"]
    parsed = example_end_to_end.parse(arguments)
    session = example_end_to_end.Session(parsed)
    assert session.pipeline.loras == {"one": 0.5, "two": 1.0}
    assert session.few_step_pipeline() is None


def test_a_quick_evaluation_edits_in_four_steps(folder: Path) -> None:
    session = example_end_to_end.Session(example_end_to_end.parse(["--models", "miniature", "--quick"]))
    quick = session.few_step_pipeline()
    assert quick is not None
    assert (quick.family.steps, quick.family.true_cfg_scale) == (4, 1.0)
    assert session.pipeline.family.steps == 20
    given = example_end_to_end.parse(["--models", "miniature", "--quick", "--steps", "9"])
    assert example_end_to_end.Session(given).few_step_pipeline() is None


def test_the_menu_comes_back_after_ctrl_c(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[object] = []
    answers = iter(["1", "5", "?", "f", "5", "b", "q"])

    def stopped(self: object) -> None:
        ran.append("stopped")
        raise KeyboardInterrupt

    monkeypatch.setattr(example_end_to_end.Session, "basic_comparison", stopped)
    monkeypatch.setattr(
        example_end_to_end.Session, "evaluate", lambda self, groups, output, quick: ran.append(quick)
    )
    monkeypatch.setattr("builtins.input", lambda _question: next(answers))
    assert example_end_to_end.main(["--models", "miniature"]) == 0
    assert ran == ["stopped", False]
    assert "Back to the menu" in capsys.readouterr().out


def test_the_first_example_says_which_arm_is_right(
    folder: Path, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session_of_examples(["--models", "miniature", "--example", "1", "--steps", "2"])
    out = capsys.readouterr().out
    assert "stripes" in out
    assert re.search(r"Baseline: (right|wrong)\. With the bridge: (right|wrong)\.", out)
    assert example_end_to_end.STRIPED in out
    card = (ROOT / "qwen_vision_bridge" / "weights" / "bridge-miniature" / "README.md").read_text("utf-8")
    assert "striped 52 → 95" in card  # what the sentence says
    with Image.open(folder / "examples_output" / "comparison_basic.png") as sheet:
        about = json.loads(sheet.text["qwen_vision_bridge"])
    assert about["family"] == "miniature"
    assert about["seeds"] == [0]
    assert str(folder) not in json.dumps(about)


@pytest.fixture(scope="module")
def run_all(
    session_of_examples: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The output folder of example 7, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run-all"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        session_of_examples([*QUICK, "--example", "7"])
    return folder / "examples_output", printed.getvalue()


@pytest.mark.slow
def test_run_all_writes_the_files_of_every_example(run_all: tuple[Path, str]) -> None:
    output, printed = run_all
    assert {path.name for path in output.iterdir()} == {Path(file).parts[0] for file in FILES}
    assert all((output / file).is_file() for file in FILES)
    assert printed.count("Saved: examples_output") == 3  # 5 covers 2, 3 and 4


@pytest.mark.slow
def test_the_full_evaluation_has_every_group(run_all: tuple[Path, str]) -> None:
    results = json.loads((run_all[0] / "full_evaluation" / "results.json").read_text())
    assert {record["group"] for record in results["records"]} == set(GROUPS)


@pytest.mark.slow
@pytest.mark.parametrize("example", [1, 2, 5, 6])
def test_options_take_the_users_photograph(
    example: int, folder: Path, photo_file: Path, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--image", str(photo_file), "--prompt", "HELLO"]
    session_of_examples([*QUICK, "--example", str(example), *asked], STOCK)
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
        known = {"change_from_input", "drift_shift_px", "drift_scale_percent", "drift_rotation_deg"}
        assert all({"change_from_input"} <= record["metrics"].keys() <= known for record in records)
        assert results.with_name("overview.png").is_file()
        assert OUTSIDE in capsys.readouterr().out
        assert OUTSIDE in results.with_name("report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_users_own_cases_run_in_four_arms_and_as_a_pair(
    folder: Path, photo: Image.Image, session_of_examples: Any
) -> None:
    (folder / "own").mkdir()
    photo = photo.resize((96, 64))
    photo.save(folder / "own" / "a.png")
    photo.rotate(90).save(folder / "own" / "b.png")
    rows = [{"id": name, "image": f"{name}.png", "prompt": "make it blue"} for name in ("a", "b")]
    (folder / "own" / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    session_of_examples(
        [*QUICK, "--example", "5", "--case-folder", "own", "--batch-arms", "4", "--no-questions"]
    )
    records = json.loads((folder / "examples_output/full_evaluation/results.json").read_text())["records"]
    assert {record["case_id"] for record in records} == {"a", "b", "a+b"}
    assert {record["arm"] for record in records} == {"baseline", "bridge", "shuffled", "target-only"}
    assert {record["level"] for record in records} == {"edit", "agreement"}


def test_a_fault_in_the_users_cases_names_line_and_field(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cases.jsonl").write_text('{"id": "a"}')
    code, error = outcome(
        example_end_to_end.main, ["--models", "miniature", "--example", "5", "--case-folder", "."], capsys
    )
    assert code == 2
    assert re.search(r"cases\.jsonl\W+line 1\b.*'image'", error, flags=re.DOTALL)


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
    assert "'x'" in out
    assert "''" in out
    assert (folder / "examples_output" / "comparison_basic.png").is_file()


def test_the_environment_check_prints_and_returns_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_environment.main([]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert check_environment.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_the_environment_check_exits_1_where_nothing_can_run(
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
    "content",
    [None, b"", b"nonsense", b"\x89PNG\r\n\x1a\n\0\0"],
    ids=["absent", "empty", "no image", "cut off"],
)
def test_bad_images_exit_2_with_one_line_and_no_output(
    script: Any, content: bytes | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "given.png"
    if content is not None:
        path.write_bytes(content)
    code, error = outcome(script, ["--image", str(path), "--models", "miniature"], capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(path) in error
    assert not (folder / "examples_output").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", " "], "prompt"),
        (["--seed", "-1", "--example", "1"], "-1"),
        (["--seed", str(2**64), "--example", "1"], str(2**64)),
        (["--strength", "nan", "--example", "1"], "nan"),
        (["--steps", "0", "--example", "1"], "num_inference_steps"),
        (["--source", "Qwen9-VL", "--example", "1"], "Qwen9-VL"),
        (["--source", ".", "--example", "1"], "config.json"),
        (["--editor", ".", "--example", "1"], "model_index.json"),
        (["--bridge", "/no/such/bridge", "--example", "1"], "/no/such/bridge"),
        pytest.param(["--load-in-8bit", "--example", "1"], "load_in_8bit", marks=WITHOUT_CUDA),
        pytest.param(["--offload", "model", "--example", "1"], 'offload="model"', marks=WITHOUT_CUDA),
    ],
)
def test_bad_arguments_exit_2_with_one_line(
    arguments: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = outcome(example_end_to_end.main, ["--models", "miniature", *arguments], capsys)
    assert code == 2
    assert named in error
    assert error.count("\n") == 1
    assert not (folder / "examples_output").exists()


def test_small_and_extreme_images_exit_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, named in (((3, 3), "3×3"), ((14 * 300, 14), "200:1")):
        Image.new("RGB", size).save(folder / "odd.png")
        code, error = outcome(
            example_extraction.main, ["--image", "odd.png", "--models", "miniature"], capsys
        )
        assert code == 2
        assert named in error


def test_released_models_without_network_or_cache_exit_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = outcome(example_extraction.main, ["--models", "qwen"], capsys)
    assert code == 2
    assert FAMILIES["qwen"].target.repo in error


def test_debug_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", "--image", "absent.png", "--debug"])
        with pytest.raises(FileNotFoundError):
            run(example_extraction.main)


LOOK = """
import os, runpy, sys

import qwen_vision_bridge

def look():
    print("imported", *[name for name in ("torch", "transformers", "diffusers") if name in sys.modules])

assert "numpy" not in sys.modules
look()
for command in sys.argv[1:]:
    sys.argv = command.split("|")
    if sys.argv[0].endswith(".py"):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stopped:
            print("code", stopped.code)
        look()
        continue
    __import__(sys.argv[0])
    print("waits", os.environ.get("OMP_WAIT_POLICY"))
    needless = {"torch._dynamo", "torch._inductor", "diffusers", "matplotlib"}
    print("needless", *sorted(needless & set(sys.modules)))
"""


def imports_of(commands: list[str], folder: Path) -> list[str]:
    """What the package alone, and each script or module after it, import and exit with, in one process."""
    paths = [f"{ROOT}/{command}" if ".py" in command else command for command in commands]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *paths],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("imported", "code", "waits", "needless"))
    ]


def test_a_wrong_path_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    commands = [
        "example_extraction.py|--image|absent.png",
        "example_extraction.py|--folder|absent|--output|out",
        "example_end_to_end.py|--image|absent.png",
        "train_bridge.py|--train_data_dir|absent|--output_dir|out",
    ]
    assert imports_of(commands, tmp_path) == ["imported", *["code 2", "imported"] * 4]


@pytest.fixture(scope="module")
def extraction_imports(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What importing the pipeline, and then an extraction, import in a process of their own."""
    commands = ["qwen_vision_bridge.pipeline", "example_extraction.py|--models|miniature"]
    return imports_of(commands, tmp_path_factory.mktemp("imports"))


@pytest.mark.slow
def test_importing_the_pipeline_imports_no_compiler(extraction_imports: list[str]) -> None:
    assert extraction_imports[1:3] == ["waits PASSIVE", "needless"]


@pytest.mark.slow
def test_extraction_never_imports_diffusers(extraction_imports: list[str]) -> None:
    assert extraction_imports[0] == "imported"
    assert extraction_imports[3:] == ["code 0", "imported torch transformers"]


SMALLER = """
import runpy, sys
from dataclasses import replace
from qwen_vision_bridge.loading.registry import FAMILIES

family = FAMILIES["miniature"]
FAMILIES["miniature"] = replace(family, image_size=64, editor=replace(family.editor, vae_area=64 * 64))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with edits of 64² px, as `session_of_examples` does."""


@pytest.mark.slow
def test_ctrl_c_exits_130_and_the_next_run_goes_on(
    folder: Path, session_of_examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process of its own is stopped after its first record; the same command then keeps what it wrote."""
    arguments = [
        "--models",
        "miniature",
        "--example",
        "4",
        "--cases",
        "2",
        "--steps",
        "2",
        "--bridge",
        "random",
        "--no-questions",
    ]
    log = folder / "examples_output" / "detail_tests" / "results.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SMALLER, str(ROOT / "example_end_to_end.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    try:
        deadline = time.monotonic() + 240
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = log.read_text().splitlines()
    assert kept
    assert all(json.loads(line)["metrics"] for line in kept)
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    session_of_examples(arguments)
    assert f"{len(kept)} of" in capsys.readouterr().out
    whole = log.read_text().splitlines()
    assert len(whole) > len(kept)
    assert whole[: len(kept)] == kept
