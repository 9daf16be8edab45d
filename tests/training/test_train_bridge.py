"""The training script plans, trains, continues and refuses in one line; two processes do what one does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_bridge
from qwen_vision_bridge.bridge import VisionBridge
from qwen_vision_bridge.cli import run
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.training.cli import parse, run_config_of, settings_of
from tests import conftest
from tests.forked import run_forked

SMALL = [
    "--max_train_samples",
    "6",
    "--validation_samples",
    "5",
    "--max_train_steps",
    "2",
    "--log_every",
    "1",
]


def refused(arguments: list[str], capsys: Any) -> str:
    """The one line with which the script refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_bridge.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(train_bridge.main)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.slow
def test_the_script_trains_calibrates_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAMILIES, "miniature", replace(conftest.SMALL, steps=2))  # the edits that it saves
    places = ["--cache_dir", str(tmp_path / "packs"), "--output_dir"]
    train_bridge.main(
        [*SMALL, *places, str(tmp_path / "one"), "--method", "perceive", "--train-batch-size=3"]
    )
    about = json.loads((tmp_path / "one" / "training.json").read_text())
    assert about["steps"] == 2
    assert about["method"] == "perceive"
    assert about["settings"]["train_batch_size"] == 3
    assert {"answered/read", "loss", "right"} == set(about["validation"])
    assert about["baseline"].keys() == about["validation"].keys()
    for line in [line for line in capsys.readouterr().out.splitlines() if "validation/loss" in line]:
        assert f"(baseline {about['baseline']['loss']:.4g})" in line
    first = VisionBridge.from_pretrained(tmp_path / "one")
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert card.data.library_name == "qwen-vision-bridge"  # the front matter parses
    assert 'family="miniature"' in card.text
    assert "method `perceive`: 6 samples of the kind `perceive`, 2 steps of 3" in card.text
    loss = f"{about['baseline']['loss']:.4f} | {about['validation']['loss']:.4f}"
    assert f"| cross-entropy of the answers (lower is better) | {loss} |" in card.text
    continued = ["--bridge", str(tmp_path / "one"), "--features", "shuffled", "--learning-rate", "1e-9"]
    train_bridge.main([*SMALL, *places, str(tmp_path / "two"), *continued])
    second = VisionBridge.from_pretrained(tmp_path / "two")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert second.state_dict()["ups.0.weight"].abs().sum() > 0
    packs = list((tmp_path / "packs").glob("*/index.json"))
    assert len(packs) == 2  # the second run found the features of the first
    train_bridge.main([*SMALL, *places, str(tmp_path / "three"), "--method", "perceive+edit"])
    about = json.loads((tmp_path / "three" / "training.json").read_text())
    assert about["validation"]["edit"] > 0
    assert len(list((tmp_path / "three" / "samples").glob("step-000002-*.png"))) == 2
    train_bridge.main([*SMALL, *places, str(tmp_path / "four"), "--method", "calibrate", "--strength", "0.1"])
    about = json.loads((tmp_path / "four" / "training.json").read_text())
    assert about["calibration"]["tokens"] == 6 * 64
    assert VisionBridge.from_pretrained(tmp_path / "four").config.blend == "replace"
    assert "in closed form, seed 0." in (tmp_path / "four" / "README.md").read_text()


def test_a_dry_run_plans_released_models_and_downloads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    places = ["--output_dir", str(tmp_path / "x"), "--cache_dir", str(tmp_path)]
    train_bridge.main(["--models", "qwen", "--method", "perceive+edit", "--dry-run", *places])
    whole = capsys.readouterr().out
    train_bridge.main(["--models", "qwen", "--method", "perceive", "--load_in_8bit", "--dry-run", *places])
    part = capsys.readouterr().out
    for line in (
        "vision tower of Qwen3-VL-8B",
        "transformer of Qwen-Image-Edit-2509, bf16",
        "5.2 M parameters",
        "unknown until measured",
        "download at most",
    ):
        assert line in whole
    assert "transformer of" not in part
    assert "with its language model, 8-bit" in part
    assert not (tmp_path / "x").exists()


def test_bad_flags_and_data_end_in_one_line(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vision_bridge.training.cli.find_spec", lambda name: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text(
        '{"image": "gone.png", "question": "Q", "answer": "A"}\n'
    )
    out = ["--output_dir", str(tmp_path / "out")]
    for arguments, message in (
        (["--train_data_dir", str(tmp_path / "data")], "metadata.jsonl, line 1: no such image"),
        (["--train_data_dir", str(tmp_path / "none")], "no such folder"),
        (["--learning_rate", "0"], "learning_rate is above 0"),
        (["--max_train_steps", "0"], "max_train_steps is a whole number from 1"),
        (["--bridge", str(tmp_path)], "config.json"),
        (["--rank", "6"], "does not divide into 4 heads"),
        (["--rival", "lora", "--features", "shuffled"], "a LoRA has no bridge"),
        (["--method", "calibrate", "--features", "target"], "cannot be calibrated"),
        (["--strength", "nan"], "finite"),
        (["--report_to", "tensorboard"], "uv run --with tensorboard"),
    ):
        assert message in refused([*arguments, *out], capsys)


def test_every_flag_reaches_what_it_is_for(tmp_path: Path) -> None:
    given = (
        f"--output-dir {tmp_path} --use-ema --levels late --rank 8 --blend=replace --train-batch-size 7 "
        "--lr-scheduler linear --edit-weight 0.5 --seed 3"
    ).split()
    arguments = parse(given, None)
    settings, run = settings_of(arguments), run_config_of(arguments)
    assert (settings.train_batch_size, settings.lr_scheduler, settings.use_ema) == (7, "linear", True)
    assert (settings.edit_weight, settings.seed) == (0.5, 3)
    assert (run.config.levels, run.config.rank, run.config.blend) == (("late",), 8, "replace")
    assert settings_of(parse(["--output_dir", "x"], None)).use_ema is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_in_bf16_and_through_8_bit_models(tmp_path: Path) -> None:
    places = ["--cache_dir", str(tmp_path / "packs"), "--output_dir"]
    for name, flags in (
        ("bf16", ["--method", "perceive+edit", "--gradient_checkpointing"]),
        ("8-bit", ["--method", "perceive", "--load_in_8bit"]),
        ("lora", ["--method", "perceive", "--rival", "lora"]),
    ):
        train_bridge.main([*SMALL, *places, str(tmp_path / name), *flags])
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert all(row["norm"] > 0 for row in rows if "norm" in row)
        assert (tmp_path / name / "training.json").is_file()


IMPORTS = """
from contextlib import nullcontext
from types import SimpleNamespace
import torch, torch._dynamo
from accelerate import Accelerator
from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge
from qwen_vision_bridge.training.trainable import TrainableBridge
from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.losses import TrainData
from qwen_vision_bridge.training.config import TrainingSettings
from qwen_vision_bridge.training.packs import build_pack
from qwen_vision_bridge.training.frozen_lm import TextBatch
from qwen_vision_bridge.training import trainer as module
from qwen_vision_bridge.training.trainer import Trainer

module._lr_schedule = lambda *_: lambda step: 1.0  # transformers' costs an import of half a minute
"""
RUN = """
class StandIn:
    device = torch.device("cpu")

    def tokenize(self, texts, edit=False):
        ids = torch.tensor([[len(prompt) % 5, 1, 2] for prompt, _ in texts])
        return TextBatch(ids, ids, (ids + 1).float(), torch.full((len(ids),), 3))

    def cross_entropy(self, features, texts, grid):
        logits = features @ torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
        labels = texts.labels.flatten()
        errors = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        return (errors * texts.weights.flatten()).sum(), torch.zeros(()), texts.weights.sum()


def encode(samples):
    encoded = []
    for sample in samples:
        noise = torch.Generator().manual_seed(len(sample.prompt))
        fields = {name: torch.randn(3, 16, generator=noise) for name in ("early", "mid", "late")}
        encoded.append({**fields, "vision": torch.randn(3, 12, generator=noise), "grid": [1, 3]})
    return encoded


def run(folder, batch):
    accelerator = Accelerator(cpu=True)
    with accelerator.main_process_first():
        pack = build_pack(folder + "-pack", WorldSamples("perceive", "train", 20), lambda: encode, "k")
    config = BridgeConfig(source_dim=16, target_dim=12, rank=8, query_dim=8, init="random")
    settings = TrainingSettings(max_train_steps=5, train_batch_size=batch, log_every=2)
    trainable = TrainableBridge(VisionBridge(config))
    trainer = Trainer(folder, trainable, TrainData(StandIn(), pack), settings, accelerator)
    trainer.run()
    open(f"{folder}-id-{accelerator.process_index}", "w").write(trainer.output.run_id)

"""


@pytest.mark.slow
def test_two_processes_equal_one_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    calls = "\n".join(
        f"processes({count}, {str(tmp_path / name)!r}, {4 // count})"
        for count, name in ((1, "one"), (2, "two"))
    )
    run_forked(IMPORTS, RUN, calls, tmp_path)
    ids = {path.read_text() for path in tmp_path.glob("two-id-*")}
    assert ids == {json.loads((tmp_path / "two" / "run.json").read_text())["run"]}
    assert len(list(tmp_path.glob("two-id-*"))) == 2
    one, two = (load_file(tmp_path / name / "checkpoint-5" / "state.safetensors") for name in ("one", "two"))
    fresh = dict(VisionBridge.from_pretrained(tmp_path / "one" / "checkpoint-5").named_parameters())
    assert fresh.keys() == {name.partition("/")[2] for name in one}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for mine, other in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert mine["answers"] == pytest.approx(other["answers"], rel=1e-4)
