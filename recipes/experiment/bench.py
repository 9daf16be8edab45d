"""The frozen models and packs that all runs of the experiment share, loaded once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qwen_vision_bridge import VisionBridge
from qwen_vision_bridge.bridge import BridgeConfig
from qwen_vision_bridge.evaluation.scoring import Scorer
from qwen_vision_bridge.evaluation.vqa import questions_of
from qwen_vision_bridge.io import digest_of, write_json
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from qwen_vision_bridge.synthetic.cases import Case, make_cases
from qwen_vision_bridge.training.calibration import calibrate, token_stream
from qwen_vision_bridge.training.checkpointing import save_result
from qwen_vision_bridge.training.config import TrainingSettings
from qwen_vision_bridge.training.data import Sample, WorldSamples
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

PART = 6000  # samples whose features are made by one process
FEWER = 4  # times fewer edits than questions to learn from: a step through the transformer costs more


def samples_parts(kind: str, samples: int) -> list[WorldSamples]:
    """What is learnt from where there are so many questions, in parts for several processes."""
    count = samples if kind == "perceive" else max(samples // FEWER, 1)
    return [WorldSamples(kind, "train", min(PART, count - k), first=k) for k in range(0, count, PART)]


class CaseSamples:
    """Every question of some cases, with the case and kind it belongs to."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.asked = [(case, question) for case in cases for question in questions_of(case)]
        self.digest = digest_of([[case.case_id, question.text] for case, question in self.asked])

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Sample:
        case, question = self.asked[index]
        return Sample(case.image, question.text, question.answer)


class Bench:
    """Models and data of the experiment.

    Args:
        folder: of packs and runs. samples: questions to learn from; edits are fewer.
        workers: processes that render, or measure images.
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
        self.folder, self.samples, self.workers = folder, samples, workers
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
        self._questions: dict[tuple[str, str, int], tuple[Pack, CaseSamples]] = {}
        self._scorer: Scorer | None = None

    def reader(self, model: Any = None) -> FrozenLanguageModel:
        """A reader of the pipeline's own text encoder, or of another one that learns."""
        spec = self.family.target
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        own = self.pipeline.pipe.text_encoder
        return FrozenLanguageModel(model or own, processor, self.family, trainable=model is not None)

    def samples_part(self, kind: str, number: int) -> Pack:
        """The features of one part; those of questions with what the target sees of sharp images."""
        return self._pack(samples_parts(kind, self.samples)[number], kind, teacher=kind == "perceive")

    def samples(self, kind: str, count: int | None = None, teacher: bool = True) -> Pack:
        """What is learnt from, the first `count` samples alone if that is given.

        Args:
            teacher: whether what the target sees of sharp images is in it.
        """
        if kind not in self._joined:
            numbers = range(len(samples_parts(kind, self.samples)))
            self._joined[kind] = join([self.samples_part(kind, number) for number in numbers], self.device)
        return _part(self._joined[kind], count, teacher)

    def questions(self, group: str, split: str, count: int) -> tuple[Pack, CaseSamples]:
        """Questions about held-out cases of a group."""
        key = (group, split, count)
        if key not in self._questions:
            samples = CaseSamples(make_cases(group, count, seed=7, split=split))
            self._questions[key] = join([self._pack(samples, "perceive", teacher=True)], self.device), samples
        return self._questions[key]

    @property
    def scorer(self) -> Scorer:
        """Measures edited images, for as long as this process lives."""
        if self._scorer is None:
            self._scorer = Scorer(self.workers)
        return self._scorer

    def close(self) -> None:
        """End the processes that measure."""
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    def train_data(self, design: Design, reader: FrozenLanguageModel) -> TrainData:
        """What a design learns from."""
        packs = {kind: self.samples(kind, design.samples) for kind in design.method.split("+")}
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
            choose_gate(learner, TrainData(self.reader(), self.samples("perceive", design.samples)))
        for name, parameter in bridge.named_parameters():
            parameter.requires_grad_(not (design.frozen and name.startswith(design.frozen)))
        return learner, self.reader()

    def train(self, design: Design, seed: int) -> Path:
        """The folder of a design's bridge at a seed: trained now, from its last checkpoint on, or there."""
        folder = design.place(self.folder, seed)
        if design.is_finished(self.folder, seed):
            return folder
        if design.method == "sharp":
            write_json(folder / "done.json", {"design": design.name, "seed": seed})
            return folder
        learner, reader = self.learner(design, seed)
        if design.is_trained:
            steps = max(round(design.share * self.settings.max_train_steps), 1)
            changed = replace(self.settings, max_train_steps=steps, seed=seed, **design.settings)
            learning = Learning(learner)
            trainer = Trainer(folder, learning, self.train_data(design, reader), changed, self.accelerator)
            trainer.resume("latest")
            if not trainer.run():
                raise KeyboardInterrupt
            with trainer.averaged():
                save_result(folder, learner.save, trainer.output)
        else:
            save_result(folder, learner.save)
        write_json(folder / "done.json", {"design": design.name, "seed": seed})
        return folder

    def load(self, design: Design, seed: int) -> tuple[Trainable, FrozenLanguageModel]:
        """A finished design, to be asked."""
        folder = design.place(self.folder, seed)
        if design.method == "sharp":
            return Untouched("highres"), self.reader()
        if design.rival:
            from peft import PeftModel

            model = PeftModel.from_pretrained(copy.deepcopy(self.pipeline.pipe.text_encoder), folder)
            return Untouched(), self.reader(model.base_model.model)
        bridge = VisionBridge.from_pretrained(folder).to(self.device)
        return TrainableBridge(bridge, design.features, seed=seed), self.reader()

    def _calibrated(self, design: Design, config: BridgeConfig) -> VisionBridge:
        """Of the config's own rank, on all levels alike: query and keys do nothing yet."""
        pack = self.samples("perceive", design.samples, design.teacher)
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


class Untouched:
    """The features as the target's tower makes them, of what the pipeline shows it or of sharp images."""

    def __init__(self, field: str = "vision") -> None:
        self.field = field

    def vision_features(self, pack: Pack, samples: Tensor) -> Tensor:
        return pack.rows(self.field, samples).float()


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
