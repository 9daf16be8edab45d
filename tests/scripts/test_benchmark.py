"""The benchmark measures what it says, keeps what it has, and keeps to its time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import benchmark
from benchmarks import calibration as bench_calibration
from benchmarks import devices as bench_devices
from benchmarks import edits as bench_edits
from benchmarks import parts as bench_parts
from benchmarks.random_checkpoints import (
    CONFIGS,
    TRANSFORMER,
    drop_language_shards,
    is_complete,
    model_config,
    vision_language_shapes,
    write_checkpoint,
)
from benchmarks.runner import Bench, Settings, meets, table
from benchmarks.timing import Measured, Stages, in_turn, peak_memory, summarise
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.registry import FAMILIES, MODELS
from qwen_vision_bridge.loading.towers import load_tower
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from tests.conftest import SMALL

CPU = torch.device("cpu")
COLUMNS = {"name", "value", "unit", "bar", "spread", "n", "device", "command", "date"}


def bench(folder: Path, **changes: Any) -> Bench:
    return Bench(Settings(folder=folder / "models", **changes), folder / "out", CPU)


def test_median_and_spread() -> None:
    assert summarise([5.0]) == Measured(5.0, 0.0, 1)
    assert summarise([1, 2, 3, 4, 100]) == Measured(3, 2.0, 5)
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])


def test_calls_are_measured_in_turn_and_stop_when_time_is_short() -> None:
    order: list[str] = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    found = in_turn(calls, CPU, repeats=3, warmup=1)
    assert "".join(order) == "abababab"
    assert [len(values) for values in found.values()] == [3, 3]
    assert all(len(values) == 1 for values in in_turn(calls, CPU, 5, 0, lambda took: took >= 0).values())


def test_every_stage_of_both_arms_is_measured_without_traces(pipe: Any, photo: Image.Image) -> None:
    editor = EnhancedQwenImageEdit(SMALL, "random", pipe=pipe, feature_cache=False)
    counts = {}
    for arm, options in bench_edits.ARMS.items():
        with Stages(pipe, editor.bridge, editor.extractor) as stages:
            editor.generate(photo, "make it blue", num_inference_steps=2, **options)
        counts[arm] = {stage: len(seconds) for stage, seconds in stages.seconds().items()}
        assert all(second > 0 for seconds in stages.seconds().values() for second in seconds)
    common = {"target tower": 2, "language model": 2, "VAE encode": 1, "DiT step": 4, "VAE decode": 1}
    assert counts["baseline"] == common
    assert counts["enhanced"] == {**common, "source tower": 1, "bridge": 2}
    assert "encode" not in vars(pipe.vae)
    assert "contributions" not in vars(editor.bridge)


def test_rows_have_the_promised_columns_and_the_newer_one_counts(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.add("a time", [0.1, 0.2, 0.3], "ms", scale=1e3)
    made.add("a ratio", 1.02, "times", "<= 1.01")
    made.add("a ratio", 1.005, "times", "<= 1.01")
    assert math.isnan(made.add("memory of a CPU", math.nan, "GB"))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["a time", "a ratio"]
    assert all(set(row) == COLUMNS for row in rows)
    assert (rows[0]["value"], rows[0]["spread"], rows[0]["n"]) == (200, 100, 3)
    assert meets(rows[0]) is None
    assert meets(rows[1]) is True
    assert meets({**rows[1], "value": 1.02}) is False
    assert "met" in table(rows, barred=True)
    assert "a time" not in table(rows, barred=True)


def test_a_value_of_another_device_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.rows.append({"name": "a rate", "value": 9.0, "device": "NVIDIA H200"})
    assert made.value_of("a rate") is None
    made.add("a rate", 2.0, "images/s")
    assert made.value_of("a rate") == 2


def test_without_cuda_there_is_no_peak() -> None:
    with peak_memory(CPU) as peak:
        pass
    assert math.isnan(peak[0])


@pytest.mark.slow
def test_edits_are_measured_and_strength_zero_has_stock_bits(
    tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vision_bridge.pipeline.load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(bench_edits, "SHORT", 2)
    monkeypatch.setitem(FAMILIES, "miniature", SMALL)
    made = bench(tmp_path, side=64, steps=2, repeats=2)
    bench_edits.edits(made)
    bench_edits.memory_mode(made, 24)
    bench_edits.miniature_modes(made)
    found = {row["name"]: row for row in made.rows}
    where = "whole edit at 64², 2 steps with guidance"
    assert found[f"{where}, enhanced ÷ baseline"]["n"] == 2
    assert found[f"{where}, stock pipeline as installed"]["value"] > 0
    for arm, stages in {"baseline": 5, "enhanced": 7}.items():
        assert sum(name.startswith("stage, ") and name.endswith(arm) for name in found) == stages
    assert found["plain: strength 0 has the stock image's bits"]["value"] == 1
    assert found["plain: a random bridge changes the image"]["value"] == 1
    assert found["miniature, plain: strength 0 has the stock image's bits"]["value"] == 1
    assert found["24 GB mode (plain): an enhanced edit completes inside the cap"]["value"] == 1
    assert not any("GPU memory" in name for name in found)  # which a CPU has none of


def test_a_mode_that_does_not_fit_is_a_row_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qwen_vision_bridge.pipeline.load_pipeline", exhausted)
    made = bench(tmp_path, side=64)
    bench_edits.memory_mode(made, 16)
    assert [(row["name"], row["value"]) for row in made.rows] == [
        ("16 GB mode (plain): an enhanced edit completes inside the cap", 0)
    ]
    assert "ran out of memory in mode plain; this needs less" in capsys.readouterr().out


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three stand-ins for parts, the second of which fails; returns which ran."""
    ran: list[str] = []

    def part(name: str) -> Any:
        def run(made: Bench) -> None:
            ran.append(name)
            if name == "second":
                raise RuntimeError("planted")
            made.add(name, 1.0, "s")

        return bench_parts.Part(run, 100)

    monkeypatch.setattr(bench_parts, "PARTS", {name: part(name) for name in ("first", "second", "third")})
    return ran


@pytest.mark.slow
def test_a_failed_part_is_listed_and_repeated_by_the_next_run(
    tmp_path: Path, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--output", str(tmp_path), "--device", "cpu"]
    assert benchmark.main(command) == 1
    assert "failed: second" in capsys.readouterr().out
    assert benchmark.main(command) == 1
    assert parts == ["first", "second", "third", "second"]
    assert benchmark.main([*command, "--again", "--parts", "first"]) == 0
    assert benchmark.main([*command, "--steps", "7", "--parts", "first"]) == 0  # other settings, so again
    assert parts[4:] == ["first", "first"]
    with pytest.raises(ValueError, match="unknown part 'fourth'"):
        benchmark.main([*command, "--parts", "fourth"])


def test_no_part_is_begun_that_the_time_does_not_do_for(
    tmp_path: Path, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--output", str(tmp_path), "--device", "cpu", "--family", "qwen", "--minutes", "1"])
    assert not parts
    assert "skipped for lack of time, run again: first, second, third" in capsys.readouterr().out


def test_a_part_in_a_process_of_its_own_gets_the_same_settings() -> None:
    argv = ["benchmark.py", "--parts", "mode-24,edits", "--family", "qwen", "--minutes=9", "--steps", "4"]
    assert bench_parts._without(argv, "--parts", "--minutes") == [
        "benchmark.py",
        "--family",
        "qwen",
        "--steps",
        "4",
    ]


def test_files_below_the_folder_that_are_not_its_own_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies where measurements or random weights would go is left alone, or refused."""
    said = "9.5 images/s\nTook 3 s"
    monkeypatch.setattr(bench_devices, "_launch", lambda *_: said)
    for name in ("features", "evaluation-1", "images-2", "source", "editor"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    made = bench(tmp_path, images=2)
    assert bench_devices._extraction(made, tmp_path, 1) == 9.5
    assert bench_devices._evaluation(made, 1) == 3
    with pytest.raises(FileExistsError, match="images-2"):
        bench_devices._folder(made)
    with pytest.raises(FileExistsError, match="source"):
        made._write(editor=True, whole=False)
    left = sorted(path.relative_to(tmp_path / "models").as_posix() for path in tmp_path.glob("models/**/*.*"))
    assert left == [
        f"{name}/config.json" for name in ("editor", "evaluation-1", "features", "images-2", "source")
    ]


def test_every_number_that_has_to_be_shown_has_a_part() -> None:
    needed = ("extraction", "source-tower", "target-tower", "bridge", "expected-output", "edits", "devices")
    assert set(needed) <= set(bench_parts.PARTS)
    assert [name for name, part in bench_parts.PARTS.items() if part.alone] == [
        "mode-16",
        "mode-24",
        "mode-12",
        "mode-48",
        "calibration",
    ]


def test_random_checkpoints_have_the_released_sizes() -> None:
    """Bytes in 16 bits as counted on checkpoints that were written in full; the DiT's 20.43 B parameters."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    for name, size in (("Qwen3-VL-8B", 17_534_247_392), ("Qwen2.5-VL-7B", 16_584_333_312)):
        shapes = dict(vision_language_shapes(model_config(name)))
        assert 2 * sum(shape.numel() for shape in shapes.values()) == size
        assert any(key.startswith("model.visual." if "3-VL" in name else "visual.") for key in shapes)
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel(**TRANSFORMER)
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e9, 2) == 20.43
    assert set(CONFIGS) <= set(MODELS)


@pytest.mark.slow
def test_a_random_checkpoint_is_sharded_and_its_tower_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.random_checkpoints.SHARD_BYTES", 8_000_000)
    total = write_checkpoint("Qwen3-VL-8B", tmp_path, tiny=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert len(set(index["weight_map"].values())) > 2
    tower = load_tower(resolve_family("qwen", source=tmp_path).source)
    assert tower.bytes_read < tower.total_bytes
    weights = tower.model.blocks[3].mlp.linear_fc1.weight
    assert 0.9 < float(weights.std() * weights.shape[1] ** 0.5) < 1.1
    assert not torch.equal(weights, tower.model.blocks[4].mlp.linear_fc1.weight)
    assert (tower.model.blocks[0].norm1.weight == 1).all()
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert all(index["weight_map"][name] == file for name in opened.keys())  # noqa: SIM118
    assert is_complete(tmp_path)
    drop_language_shards(tmp_path)
    assert is_complete(tmp_path, towers_only=True)
    assert not is_complete(tmp_path)
    assert load_tower(resolve_family("qwen", source=tmp_path).source).total_bytes < tower.total_bytes


@pytest.mark.slow
def test_calibration_is_timed_with_its_memory(tmp_path: Path) -> None:
    made = bench(tmp_path)
    bench_calibration.calibration(made)
    seconds, peak, before = (row["value"] for row in made.rows)
    assert seconds > 0
    assert peak >= before > 0.01


def test_the_figure_shows_both_arms(tmp_path: Path) -> None:
    from benchmarks.figure import stage_figure

    rows = [
        {"name": f"stage, {stage}, {arm}{memory}", "value": 3.0}
        for stage in ("DiT step", "bridge")
        for arm in ("baseline", "enhanced")
        for memory in ("", ", peak GPU memory")
        if (stage, arm) != ("bridge", "baseline")
    ]
    with_memory, without = stage_figure(rows, "a device"), stage_figure(rows[::2], "a device")
    assert with_memory.width > without.width
    slower = [{**row, "value": 6.0} if "enhanced" in row["name"] else row for row in rows]
    assert stage_figure(slower, "a device").tobytes() != with_memory.tobytes()
