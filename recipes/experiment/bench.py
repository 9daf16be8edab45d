"""The frozen models and packs that all training runs of the experiment share, loaded once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.bridge import BridgeConfig
from qwen_vision_bridge.io import write_json
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from qwen_vision_bridge.training.calibration import calibrate, token_stream
from qwen_vision_bridge.training.checkpointing import save_result
from qwen_vision_bridge.training.config import TrainingSettings
from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.features import FeatureEncoder
from qwen_vision_bridge.training.flow_matching import FlowMatching
from qwen_vision_bridge.training.frozen_lm import FrozenLanguageModel
from qwen_vision_bridge.training.losses import TrainData
from qwen_vision_bridge.training.packs import Encode, Pack, build_pack, join
from qwen_vision_bridge.training.run import pack_name
from qwen_vision_bridge.training.trainable import LoraBaseline, Trainable, TrainableBridge
from qwen_vision_bridge.training.trainer import Trainer
from qwen_vision_bridge.training.validation import choose_gate

from .designs import EXTRA, Design

PART = 6000  # samples whose features are in one file
FEWER = 4  # times fewer edits than questions to learn from: a step through the transformer costs more


def samples_parts(kind: str, samples: int) -> list[WorldSamples]:
    """What is learnt from where there are so many questions, in parts."""
    count = samples if kind == "perceive" else max(samples // FEWER, 1)
    return [WorldSamples(kind, "train", min(PART, count - k), first=k) for k in range(0, count, PART)]


class Bench:
    """Models and data of the experiment.

    Args:
        folder: of packs and runs. samples: questions to learn from; edits are fewer.
        workers: processes that render.
        packs: where features are kept; None is the folder itself.
        settings: of all designs, where they say nothing else.
    """

    def __init__(
        self,
        folder: Path,
        samples: int,
        workers: int,
        packs: Path | None = None,
        settings: TrainingSettings | None = None,
    ) -> None:
        self.folder, self.count, self.workers = folder, samples, workers
        self.packs = packs or folder / "packs"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline = EnhancedQwenImageEdit("miniature", "fresh", device=self.device, dtype=self.dtype)
        self.pipeline.pipe.set_progress_bar_config(disable=True)
        self.family = self.pipeline.family
        self._encoder = {
            teacher: FeatureEncoder(self.family, self.device, self.dtype, teacher)
            for teacher in (False, True)
        }
        self.settings = settings or TrainingSettings()
        self.flow = FlowMatching(self.pipeline.pipe, self.family.editor)
        self.accelerator = Accelerator(mixed_precision="bf16" if self.device.type == "cuda" else "no")
        self._joined: dict[str, Pack] = {}

    def reader(self, model: Any = None) -> FrozenLanguageModel:
        """A reader of the pipeline's own text encoder, or of another one that learns."""
        spec = self.family.target
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        own = self.pipeline.pipe.text_encoder
        return FrozenLanguageModel(model or own, processor, self.family, trainable=model is not None)

    def pack(self, kind: str, count: int | None = None, teacher: bool = True) -> Pack:
        """Features of what is learnt from, the first `count` samples alone where that is given.

        Args:
            teacher: whether what the target sees of sharp images is in it.
        """
        if kind not in self._joined:
            parts = samples_parts(kind, self.count)
            with self.accelerator.main_process_first():
                packs = [self._pack(part, kind, teacher=kind == "perceive") for part in parts]
            self._joined[kind] = join(packs, self.device)
        return _part(self._joined[kind], count, teacher)

    def train_data(self, design: Design, reader: FrozenLanguageModel) -> TrainData:
        """What a design learns from."""
        packs = {kind: self.pack(kind, design.samples) for kind in design.method.split("+")}
        return TrainData(reader, packs.get("perceive"), packs.get("edit"), self.flow)

    def learner(self, design: Design, seed: int) -> tuple[Trainable, FrozenLanguageModel]:
        """What a design trains, at its start, and what reads for it."""
        config = BridgeConfig.for_family(self.family, seed=seed, **design.config)
        if design.rival:
            model = copy.deepcopy(self.pipeline.pipe.text_encoder)
            return LoraBaseline(model, config, seed), self.reader(model)
        if design.start is not None:
            bridge = VisionBridge.from_pretrained(EXTRA[design.start].place(self.folder, seed))
        elif design.method == "calibrate":
            bridge = self._calibrated(design, config)
        else:
            changes = {"init": "random"} if design.method == "random" else {}
            bridge = VisionBridge(replace(config, **changes))
        with torch.no_grad():
            for name, parameter in bridge.named_parameters():
                if name.startswith(design.zeroed):
                    parameter.zero_()
        learner = TrainableBridge(bridge.to(self.device), design.features, seed=seed)
        if design.method == "calibrate":
            choose_gate(learner, TrainData(self.reader(), self.pack("perceive", design.samples)))
        for name, parameter in bridge.named_parameters():
            parameter.requires_grad_(not (design.frozen and name.startswith(design.frozen)))
        return learner, self.reader()

    def train(self, design: Design, seed: int) -> Path:
        """The folder of a design's bridge at a seed: trained now, from its last checkpoint on, or there."""
        folder, accelerator = design.place(self.folder, seed), self.accelerator
        if design.is_finished(self.folder, seed):
            return folder
        if design.is_trained:
            learner, reader = self.learner(design, seed)
            steps = max(round(design.share * self.settings.max_train_steps), 1)
            settings = replace(self.settings, max_train_steps=steps, seed=seed, **design.settings)
            trainer = Trainer(
                folder, Learning(learner), self.train_data(design, reader), settings, accelerator
            )
            trainer.resume("latest")
            if not trainer.run():
                raise KeyboardInterrupt
            if accelerator.is_main_process:
                with trainer.averaged():
                    save_result(folder, learner.save, trainer.output)
        elif design.method != "sharp" and accelerator.is_main_process:
            learner, _ = self.learner(design, seed)
            save_result(folder, learner.save)
        if accelerator.is_main_process:
            write_json(folder / "done.json", {"design": design.name, "seed": seed})
        accelerator.wait_for_everyone()
        return folder

    def _calibrated(self, design: Design, config: BridgeConfig) -> VisionBridge:
        """Of the config's own rank, on all levels alike: query and keys do nothing yet."""
        pack = self.pack("perceive", design.samples, design.teacher)
        aside = TrainableBridge(VisionBridge(config), design.features)
        return calibrate(config, lambda: token_stream(pack, aside), ranks=[config.rank]).bridge

    def _pack(self, samples: Any, kind: str, teacher: bool = False) -> Pack:
        encoder = self._encoder[teacher]
        key, name = pack_name(encoder.key(), kind, self.family, samples)
        return build_pack(self.packs / name, samples, lambda: self._see(kind, encoder), key, self.workers)

    def _see(self, kind: str, encoder: FeatureEncoder) -> Encode:
        if kind == "perceive":
            return encoder.encode
        return lambda samples: [
            one | other for one, other in zip(encoder.encode(samples), self.flow.encode(samples), strict=True)
        ]


class Learning:
    """A learner of which only the parameters that require a gradient are trained."""

    def __init__(self, learner: Trainable) -> None:
        self.vision_features, self.save = learner.vision_features, learner.save
        self._learner = learner

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._learner.parameters().items() if p.requires_grad}


def _part(pack: Pack, count: int | None, teacher: bool) -> Pack:
    """The same pack with only its first samples to draw from, or without what the teacher sees."""
    if count is None and teacher:
        return pack
    part = copy.copy(pack)
    if count is not None:
        cut = {name: members[members < count] for name, members in pack.layouts.items()}
        part.layouts = {name: members for name, members in cut.items() if len(members)}
    if not teacher:
        part.fields = {name: rows for name, rows in pack.fields.items() if name != "highres"}
    return part
