"""Two processes write the records that one writes, and a kill loses none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_vision_bridge.distributed import Processes
from qwen_vision_bridge.evaluation.record_log import RecordLog

RUN = """
import sys
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from qwen_vision_bridge.evaluation.arms import Arm
from types import SimpleNamespace
from qwen_vision_bridge.bridge import VisionBridge, BridgeConfig
from qwen_vision_bridge.pairs import Edit
from qwen_vision_bridge.evaluation.evaluate import evaluate
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.evaluation.report.tables import write_results
from qwen_vision_bridge.synthetic.cases import make_cases


class StandIn:
    pipe = SimpleNamespace(_encode_vae_image=None)
    family, device = FAMILIES["miniature"], torch.device("cpu")

    def fingerprint(self, enhanced):
        return {"family": "stand-in", "source": "none"}

    def provenance(self, seeds):
        return {"seeds": seeds}

    def keeping_source(self):
        return nullcontext()

    def extract_source(self, images):
        return None

    def check_edit(self, image, prompt, seed=0, strength=1.0, **options):
        images = image if isinstance(image, list) else [image]
        return Edit(images, prompt, seed, options, strength=strength)

    def edit(self, edit):
        image = edit.images[-1]
        return image if edit.bridge is None else image.rotate(edit.seed % 7), None


arms = [Arm("baseline"), Arm("turned", VisionBridge(BridgeConfig.for_family(FAMILIES["miniature"])), "x")]
cases = make_cases("space", 3, size=64) + make_cases("detail", 2, size=64)
found = evaluate(StandIn(), cases, sys.argv[1], arms, perception=False)
if found is not None:
    from pathlib import Path
    from qwen_vision_bridge.distributed import Processes
    Path(sys.argv[1], "dealt").write_text(f"dealt to {Processes().count}")
    write_results(sys.argv[1], found)
"""


def results(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for record in data["records"]:
        del record["seconds"]
    return {name: data[name] for name in ("records", "summary", "arms")}


WORK = """
import sys, time
from qwen_vision_bridge.distributed import Processes
with Processes().working_in(sys.argv[1]):
    print("working", flush=True)
    time.sleep(60)
"""


def test_another_run_in_the_folder_is_named_until_it_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real process, which is killed; what is left of it is removed."""
    other = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"working\n"
    with Processes().working_in(tmp_path), Processes().working_in(tmp_path):  # itself is no other
        assert [f"process {other.pid} works in {tmp_path}" in text for text in caplog.messages] == [True] * 2
    other.kill()
    other.wait()
    caplog.clear()
    assert len(list(tmp_path.iterdir())) == 1
    with Processes().working_in(tmp_path):
        assert caplog.messages == []
    assert list(tmp_path.iterdir()) == []


def test_the_other_processes_of_a_run_claim_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = tmp_path / ".working-elsewhere-7.json"
    host.write_text('{"started": 1.0}')
    with Processes().working_in(tmp_path):
        assert "process 7 on elsewhere (if it still runs)" in caplog.text
        assert len(list(tmp_path.iterdir())) == 2
    caplog.clear()
    monkeypatch.setattr(Processes, "index", 1)
    with Processes().working_in(tmp_path):
        assert caplog.messages == []
        assert list(tmp_path.iterdir()) == [host]


@pytest.mark.slow
def test_two_processes_equal_one_record_by_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is this process, two are real ones."""
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    # Without --multi_gpu accelerate starts one process on a CPU; with this it leaves the GPUs alone.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(tmp_path / "home-two"))
    command = [*launch, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    assert "works in" not in done.stderr  # none of them takes the other for another run
    monkeypatch.setenv("QWEN_VISION_BRIDGE_HOME", str(tmp_path / "home-one"))  # no baselines of the other run
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    exec(compile(RUN, str(script), "exec"), {"__name__": "__main__"})
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert "dealt to 2" in (tmp_path / "two" / "dealt").read_text()
    assert len(results(tmp_path / "two")["records"]) == 10
    assert not any(record["error"] for record in results(tmp_path / "two")["records"])
    assert not list((tmp_path / "two").glob("results.part-*"))


def test_a_merge_keeps_every_record_once_and_can_be_done_again(tmp_path: Path) -> None:
    first, second = RecordLog(tmp_path), RecordLog(tmp_path, process=1)
    first.append({"key": "a"})
    second.append({"key": "b"})
    second.append({"key": "a"})
    part = tmp_path / "results.part-1.jsonl"
    left = part.read_bytes()
    first.merge()
    part.write_bytes(left)  # as a kill between writing and deleting leaves it
    again = RecordLog(tmp_path)
    assert again.records.keys() == {"a", "b"}
    again.merge()
    lines = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == ["a", "b"]
    assert not part.exists()


def test_a_merge_leaves_other_peoples_files(tmp_path: Path) -> None:
    mine = tmp_path / "results.part-mine.jsonl"
    mine.write_text('{"key": "x"}\n')
    record_log = RecordLog(tmp_path)
    assert not record_log.records
    record_log.merge()
    assert mine.exists()


def test_a_result_replaces_an_error_and_never_the_reverse(tmp_path: Path) -> None:
    first, second = RecordLog(tmp_path), RecordLog(tmp_path, process=1)
    first.append({"key": "a", "error": "lost"})
    first.append({"key": "b", "error": None})
    second.append({"key": "a", "error": None})
    second.append({"key": "b", "error": "lost"})
    assert {key: record["error"] for key, record in RecordLog(tmp_path).records.items()} == {
        "a": None,
        "b": None,
    }
    first.merge()
    assert {key: record["error"] for key, record in RecordLog(tmp_path).records.items()} == {
        "a": None,
        "b": None,
    }


def test_a_record_is_read_back_whatever_its_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Line separators of Unicode are text, and a line that was cut inside a character is done again."""
    prompts = ["a\u2028b\u2029c\u0085d", "é 字 😀"]
    record_log = RecordLog(tmp_path)
    for key, prompt in enumerate(prompts):
        record_log.append({"key": str(key), "prompt": prompt, "error": None})
    assert [record["prompt"] for record in RecordLog(tmp_path).records.values()] == prompts
    path = tmp_path / "results.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex("字".encode()) + 1])
    assert list(RecordLog(tmp_path).records) == ["0"]
    assert "line 2 is cut short" in caplog.text
    RecordLog(tmp_path).append({"key": "2", "error": None})
    assert list(RecordLog(tmp_path).records) == ["0", "2"]
