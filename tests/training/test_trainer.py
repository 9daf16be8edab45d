"""Training changes the bridge alone, falls, resumes bit by bit, and keeps its last good checkpoint."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge, bridge_digest
from qwen_vision_bridge.features import FeatureCache
from qwen_vision_bridge.io import atomic_save, write_image
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.specs import MAX_SEED, step_seed
from qwen_vision_bridge.training import checkpointing as checkpointing
from qwen_vision_bridge.training.config import TrainingSettings
from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.features import FeatureEncoder
from qwen_vision_bridge.training.flow_matching import FlowMatching
from qwen_vision_bridge.training.frozen_lm import FrozenLanguageModel
from qwen_vision_bridge.training.losses import Batch, TrainData
from qwen_vision_bridge.training.packs import Pack, build_pack
from qwen_vision_bridge.training.run_folder import TrainingRun, checkpoints, find_checkpoint
from qwen_vision_bridge.training.trainable import LoraBaseline, TrainableBridge
from qwen_vision_bridge.training.trainer import NotFiniteError, Trainer
from qwen_vision_bridge.training.validation import (
    GATES,
    Answer,
    answer_loss,
    answer_questions,
    choose_gate,
    summarize,
)
from tests.conftest import SMALL

FAMILY = SMALL
SETTINGS = TrainingSettings(
    max_train_steps=4,
    train_batch_size=4,
    lr_warmup_steps=0,
    checkpointing_steps=2,
    log_every=1,
    learning_rate=5e-3,
)


def alone(**changes: Any) -> Any:
    """What the trainer asks of accelerate, for one process on a CPU, or for one of several."""
    from contextlib import nullcontext

    plain = {
        "num_processes": 1,
        "process_index": 0,
        "is_main_process": True,
        "device": torch.device("cpu"),
        "autocast": nullcontext,
        "reduce": lambda value, reduction: value,
        "wait_for_everyone": lambda: None,
        "log": lambda figures, step: None,
    }
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (2**63, ValueError), (0.5, TypeError)])
def test_training_refuses_a_seed_outside_the_range(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed is"):
        TrainingSettings(seed=seed)


def test_a_step_of_the_largest_seed_has_a_seed_torch_takes() -> None:
    assert step_seed(3, 7) == 3 * 1_000_003 + 7
    torch.Generator().manual_seed(step_seed(MAX_SEED, 10**9))


@pytest.fixture(scope="module")
def train_data(shared_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    """Twelve questions and six edits of the world, seen once."""
    root = tmp_path_factory.mktemp("packs")
    encoder = FeatureEncoder(FAMILY, "cpu", torch.float32)
    flow = FlowMatching(shared_pipe, FAMILY.editor)

    def both(samples: Any) -> Any:
        return [a | b for a, b in zip(encoder.encode(samples), flow.encode(samples), strict=True)]

    asked = build_pack(root / "asked", WorldSamples("perceive", "train", 12), lambda: encoder.encode, "k")
    edits = build_pack(root / "edits", WorldSamples("edit", "train", 6), lambda: both, "k")
    encoder.close()
    processor = load_processor(FAMILY.target.repo, FAMILY.target.processor_subfolder, None, False)
    return TrainData(FrozenLanguageModel(shared_pipe.text_encoder, processor, FAMILY), asked, edits, flow)


@pytest.fixture
def questions(train_data: TrainData) -> TrainData:
    """The questions alone."""
    return TrainData(train_data.language_model, train_data.perceive)


def bridge(features: str = "own", **changes: Any) -> TrainableBridge:
    return TrainableBridge(VisionBridge(BridgeConfig.for_family(FAMILY, **changes)), features)


def trained(
    folder: Path,
    train_data: TrainData,
    settings: TrainingSettings = SETTINGS,
    resume: str | None = None,
    **who: Any,
) -> tuple[Trainer, TrainableBridge]:
    trainable = bridge()
    trainer = Trainer(folder, trainable, train_data, settings, alone(**who))
    trainer.resume(resume)
    trainer.run()
    return trainer, trainable


@pytest.mark.slow
def test_the_loss_falls_and_only_the_bridge_has_changed(
    tmp_path: Path, train_data: TrainData, shared_pipe: Any
) -> None:
    frozen = {
        name: [parameter.detach().clone() for parameter in getattr(shared_pipe, name).parameters()]
        for name in ("text_encoder", "transformer", "vae")
    }
    settings = TrainingSettings(**{**vars(SETTINGS), "max_train_steps": 12, "train_batch_size": 6})
    fresh = bridge_digest(bridge().bridge)
    _, trainable = trained(tmp_path, train_data, settings)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for loss in ("answers", "edit"):
        assert all(math.isfinite(row[loss]) for row in rows)
    first, last = ([row["answers"] for row in part] for part in (rows[:4], rows[-4:]))
    assert sum(last) < 0.9 * sum(first)
    assert bridge_digest(trainable.bridge) != fresh
    for name, before in frozen.items():
        model = getattr(shared_pipe, name)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["perceive", "edit"])
def test_each_loss_reaches_every_part_of_a_bridge(train_data: TrainData, kind: str) -> None:
    trainable = bridge(init="random")
    losses, _ = Batch(train_data, kind, 0, 3, SETTINGS).losses(trainable, slice(0, 3))
    sum(losses.values()).backward()
    for name, parameter in trainable.parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_each_validation_shows_the_baseline_and_the_time_left(
    tmp_path: Path, questions: TrainData, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TrainingSettings(**{**vars(SETTINGS), "validation_steps": 2})
    figures = {"letters": 0.75, "gate": 1.0, "baseline/letters": 0.5}
    Trainer(tmp_path, bridge(), questions, settings, alone(), lambda step: figures).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation/" in line]
    shown = "validation/letters 0.75 (baseline 0.5)  validation/gate 1"
    assert re.fullmatch(rf"step 2/4  {re.escape(shown)}  about \d+ (s|min) left", lines[0])
    assert lines[1] == f"step 4/4  {shown}"  # nothing is left
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["validation/baseline/letters"] for row in rows if "validation/letters" in row] == [0.5] * 2


def test_a_fresh_bridge_costs_what_the_baseline_costs(train_data: TrainData) -> None:
    fresh, blended = bridge(), bridge(blend="replace")
    losses = [answer_loss(trainable, train_data, train_data.perceive) for trainable in (None, fresh, blended)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_resuming_is_bit_identical_to_not_having_stopped(tmp_path: Path, train_data: TrainData) -> None:
    _, whole = trained(tmp_path / "whole", train_data)
    cut = tmp_path / "cut"
    trainer = Trainer(cut, bridge(), train_data, SETTINGS, alone())
    original = trainer._training_step

    def stop_after_two() -> None:
        if trainer.step == 2:
            raise KeyboardInterrupt
        original()

    trainer._training_step = stop_after_two  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [path.name for path in checkpoints(cut)] == ["checkpoint-2"]
    resumed, again = trained(cut, train_data, resume="latest")
    assert bridge_digest(again.bridge) == bridge_digest(whole.bridge)
    for (name, initial), average in zip(bridge().parameters().items(), resumed.ema.module, strict=True):
        assert not torch.equal(average, initial) or average.abs().sum() == 0, name
    saved = [VisionBridge.from_pretrained(tmp_path / name / "checkpoint-4") for name in ("whole", "cut")]
    assert bridge_digest(saved[0]) == bridge_digest(saved[1]) == bridge_digest(whole.bridge)


@pytest.mark.slow
def test_accumulation_and_two_processes_equal_one_large_batch(tmp_path: Path, train_data: TrainData) -> None:
    """The second process's share is worked out here too; `test_two_processes…` starts real ones."""
    settings = vars(SETTINGS) | {"max_train_steps": 1}
    large = Trainer(
        tmp_path,
        bridge(init="random"),
        train_data,
        TrainingSettings(**settings | {"train_batch_size": 4}),
        alone(),
    )
    parts = Trainer(
        tmp_path,
        bridge(init="random"),
        train_data,
        TrainingSettings(**settings | {"train_batch_size": 2, "gradient_accumulation_steps": 2}),
        alone(),
    )
    gradients = []
    for trainer in (large, parts):
        trainer._training_step()
        gradients.append({name: p.grad.clone() for name, p in trainer.parameters.items()})
    shares = []
    for rank in (0, 1):
        trainer = Trainer(
            tmp_path,
            bridge(init="random"),
            train_data,
            TrainingSettings(**settings | {"train_batch_size": 2}),
            alone(num_processes=2, process_index=rank),
        )
        trainer.settings = TrainingSettings(**settings | {"train_batch_size": 2, "max_grad_norm": 1e9})
        trainer._training_step()
        shares.append({name: p.grad.clone() for name, p in trainer.parameters.items()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-5, rtol=1e-3)
        summed = shares[0][name] + shares[1][name]
        size = summed.norm() / whole.norm() if whole.norm() > 0 else torch.tensor(1.0)  # clipping
        torch.testing.assert_close(summed / size, whole, atol=1e-5, rtol=1e-3)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    tmp_path: Path, questions: TrainData, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Batch.losses

    def broken(self: Batch, *args: Any) -> Any:
        losses, figures = plain(self, *args)
        spoilt = self.settings.max_train_steps == 5 and trainer.step == 3
        return {name: value * (math.nan if spoilt else 1) for name, value in losses.items()}, figures

    monkeypatch.setattr(Batch, "losses", broken)
    settings = TrainingSettings(**vars(SETTINGS) | {"max_train_steps": 5, "log_every": 20})
    trainer = Trainer(tmp_path, bridge(), questions, settings, alone())
    with pytest.raises(NotFiniteError, match="up to 4"):
        trainer.run()
    (kept,) = checkpoints(tmp_path)
    assert kept.name == "checkpoint-2"
    state = checkpointing.load_checkpoint(kept)[1]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, questions: TrainData, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpointing.save_file

    def full(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(OSError, match=r"step 4 .*No space left.*checkpoint-2.*resume_from_checkpoint"):
        trained(tmp_path, questions)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    monkeypatch.setattr(checkpointing, "save_file", write)
    trainer, _ = trained(tmp_path, questions, resume="latest")
    assert trainer.step == 4


def test_a_result_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    first, second = bridge(), bridge(init="random")
    checkpointing.save_result(tmp_path, first.save)

    def half(folder: Path) -> None:
        second.save(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpointing.save_result(tmp_path, half)
    assert bridge_digest(VisionBridge.from_pretrained(tmp_path)) == bridge_digest(first.bridge)
    checkpointing.save_result(tmp_path, second.save)
    assert bridge_digest(VisionBridge.from_pretrained(tmp_path)) == bridge_digest(second.bridge)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_written_files_have_the_mode_that_the_umask_says(umask: int, tmp_path: Path) -> None:
    """A group that shares a folder reads the checkpoints in it; safetensors alone would write 0600."""
    run, learner = TrainingRun(tmp_path, "0123456789ab", {}), bridge()
    before = os.umask(umask)
    try:
        run.write()
        checkpointing.save_checkpoint(run, 1, learner.save, {"one": torch.ones(2)}, {})
        checkpointing.save_result(tmp_path, learner.save, run)
        learner.bridge.save_pretrained(tmp_path / "plain")
        atomic_save({"one": torch.ones(2)}, tmp_path / "one.safetensors")
        write_image(tmp_path / "one.png", Image.new("RGB", (8, 8)))
        FeatureCache(tmp_path / "cache").put({"key": "1"}, {"one": torch.ones(1, 2)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 14
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


def test_old_checkpoints_are_removed_and_others_refused(tmp_path: Path, questions: TrainData) -> None:
    settings = TrainingSettings(
        **vars(SETTINGS) | {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "use_ema": True}
    )
    trainer, trainable = trained(tmp_path, questions, settings)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    with trainer.averaged():
        average = bridge_digest(trainable.bridge)
    assert bridge_digest(VisionBridge.from_pretrained(tmp_path / "checkpoint-4")) == average
    assert bridge_digest(trainable.bridge) != average
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9.*there are: checkpoint-3, checkpoint-4"):
        find_checkpoint(tmp_path, "checkpoint-9")
    other = Trainer(tmp_path, bridge(rank=8, query_dim=8), questions, settings, alone())
    with pytest.raises(ValueError, match="another model"):
        other.resume("latest")
    assert find_checkpoint(tmp_path / "empty", "latest") is None
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "state.safetensors").write_bytes(b"cut short")
    with pytest.raises(OSError, match="damaged"):
        Trainer(tmp_path, bridge(), questions, settings, alone()).resume("latest")


@pytest.mark.parametrize(("helps", "best"), [(True, GATES[-1]), (False, GATES[0])])
def test_the_gate_of_a_calibrated_bridge_follows_the_answers(
    questions: TrainData, helps: bool, best: float
) -> None:
    class Mixed(TrainableBridge):
        """Its gate takes other tokens' features away, or puts them in."""

        def vision_features(self, pack: Pack, samples: Tensor) -> Tensor:
            right = pack.rows("vision", samples).float()
            share = 1 - self.bridge.gate if helps else self.bridge.gate
            return right + 3 * share * right.roll(3, 1)

    trainable = Mixed(bridge().bridge)
    assert choose_gate(trainable, questions, 6) == best
    assert float(trainable.bridge.gate.detach()) == pytest.approx(best)


def test_controls_see_what_they_should(train_data: TrainData) -> None:
    pack, samples = train_data.perceive, torch.arange(4)
    own, shuffled, target = (
        bridge(features).levels(pack, samples, pack.rows("vision", samples).float())
        for features in ("own", "shuffled", "target")
    )
    partners = pack.partners(0)
    assert sorted(partners.tolist()) == list(range(12))
    assert not (partners == torch.arange(12)).any()
    assert torch.equal(own[0], pack.rows("early", samples))
    assert torch.equal(shuffled[2], pack.rows("late", partners[samples]))
    assert torch.equal(target[0], target[2])
    assert target[0].shape == own[0].shape


@pytest.mark.slow
def test_a_lora_learns_in_the_language_model_and_is_as_large(
    tmp_path: Path, questions: TrainData, target_copy: Callable[[], Any]
) -> None:
    from peft import PeftModel

    config = BridgeConfig.for_family(FAMILY)
    model = target_copy()
    lora = LoraBaseline(model, config)
    size = sum(parameter.numel() for parameter in lora.parameters().values())
    wanted = sum(parameter.numel() for parameter in VisionBridge(config).parameters())
    assert abs(size - wanted) < 0.1 * wanted
    assert all("language_model" in name for name in lora.parameters())
    processor = questions.language_model.processor
    train_data = TrainData(FrozenLanguageModel(model, processor, FAMILY, trainable=True), questions.perceive)
    before = answer_loss(lora, train_data, train_data.perceive)
    assert before == pytest.approx(answer_loss(None, questions, questions.perceive), abs=1e-5)
    Trainer(tmp_path, lora, train_data, SETTINGS, alone()).run()
    after = answer_loss(lora, train_data, train_data.perceive)
    assert after["loss"] < before["loss"]
    with lora.switched_off():
        assert answer_loss(None, train_data, train_data.perceive) == pytest.approx(before, abs=1e-5)
    loaded = PeftModel.from_pretrained(target_copy(), tmp_path / "checkpoint-4")
    again = TrainData(FrozenLanguageModel(loaded.base_model.model, processor, FAMILY), questions.perceive)
    assert answer_loss(None, again, questions.perceive) == pytest.approx(after, abs=1e-5)


@pytest.fixture
def target_copy(editor_folder: Path) -> Callable[[], Any]:
    """Targets of the test's own, which a LoRA may change."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return lambda: Qwen2_5_VLForConditionalGeneration.from_pretrained(
        editor_folder / "text_encoder", dtype=torch.float32
    )


def test_answers_are_scored_letter_by_letter(questions: TrainData) -> None:
    answers = answer_questions(None, questions.language_model, questions.perceive, "read")
    assert answers
    assert all(answer.kind == "read" for answer in answers)
    one = Answer(0, "What does it say?", "DTOV/AB", "DTXV")
    assert one.letters == [[True, True, False, True], [False, False]]
    found = summarize([one, Answer(1, "Where is it?", "ab", "ab")])
    assert found == {"answered/locate": 1.0, "answered/read": 0.0, "letters": 0.5, "words": 0.0}
