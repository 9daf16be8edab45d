"""A training run from data and frozen models to a bridge in a folder that loads anywhere.

Data is checked before a model is loaded. Features of both towers are computed once, into packs that later
runs on the same data find again; then the towers are freed.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bridge import VisionBridge
from ..distributed import LONGEST_WAIT
from ..features import FORMAT
from ..io import digest_of, provenance, write_json
from ..loading.editors import editor_revision
from ..loading.memory import device_name
from ..loading.towers import load_processor, load_whole
from ..pipeline import EnhancedQwenImageEdit
from ..specs import Family, cache_home
from .calibration import Calibration, calibrate, token_stream
from .card import BASELINE, beside_baseline, card_texts
from .checkpointing import save_result
from .config import Kind, RunConfig, TrainingSettings
from .data import Samples, Split, load_samples
from .features import FeatureEncoder
from .flow_matching import FlowMatching
from .frozen_lm import FrozenLanguageModel
from .losses import TrainData
from .packs import Encode, Pack, build_pack
from .run_folder import SUMMARY, TrainingRun, check_output_dir, open_run
from .trainable import LoraBaseline, Trainable, TrainableBridge
from .trainer import Trainer
from .validation import choose_gate, validate

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import QwenImageEditPlusPipeline
    from transformers import PreTrainedModel

SAMPLE_EDITS = 2  # held-out edits that are saved as images in a validation


def train(
    run: RunConfig,
    settings: TrainingSettings,
    resume: str | None = None,
    mixed_precision: str | None = None,
    report_to: str | None = None,
) -> Path:
    """Train or calibrate and write the result into the run's folder.

    Args:
        resume: a checkpoint's path or name, or `latest`.
        mixed_precision, report_to: as accelerate takes them.

    Returns:
        The folder, which `bridge=` and `--bridge` take.

    Raises:
        FileNotFoundError, ValueError, OSError: wrong data, models or flags, a full disk, see `Trainer`.
        FileExistsError: the folder holds another run or foreign files, see `check_output_dir`.
    """
    calibrating = run.method == "calibrate"
    if calibrating and resume is not None:
        raise ValueError("a calibration has no checkpoints: leave --resume_from_checkpoint out")
    fingerprint = {**run.fingerprint(), "seed": settings.seed}
    steps = 0 if calibrating else settings.max_train_steps
    check_output_dir(run.output_dir, resume, run.overwrite_output_dir, fingerprint, steps)
    samples = {kind: load_samples(run, kind) for kind in run.kinds}
    from accelerate import Accelerator, InitProcessGroupKwargs  # the checks above answer sooner

    accelerator = Accelerator(
        mixed_precision=mixed_precision or ("bf16" if torch.cuda.is_available() else "no"),
        log_with=report_to,
        project_dir=str(run.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    job = TrainingJob(run, settings, samples, accelerator)
    if calibrating:
        job.calibrate()
    else:
        job.train(resume)
    return run.output_dir


def pack_name(encoder_key: str, kind: Kind, family: Family, samples: Samples) -> tuple[str, str]:
    """The key of the features of a kind, and the name of the folder of their pack."""
    editor = editor_revision(family.editor) if kind == "edit" else ""
    key = digest_of([encoder_key, kind, editor])
    return key, digest_of([FORMAT, key, samples.digest, len(samples)])


class FrozenModels:
    """The frozen models of a run, each loaded when it is first needed."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.device = run, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @cached_property
    def encoder(self) -> FeatureEncoder:
        """Both vision towers."""
        return FeatureEncoder(self.run.family, self.device, self.dtype, self.run.highres_target)

    @cached_property
    def pipe(self) -> QwenImageEditPlusPipeline:
        """The stock edit pipeline, needed for edits only."""
        family, place = self.run.family, {"device": self.device, "dtype": self.dtype}
        return EnhancedQwenImageEdit(family, "fresh", self.run.load_in_8bit, **place).pipe

    @cached_property
    def target(self) -> PreTrainedModel:
        """The target with its language model; the pipeline's own where edits are trained too."""
        if "edit" in self.run.kinds:
            return self.pipe.text_encoder
        return load_whole(self.run.family.target, self.device, self.dtype, self.run.load_in_8bit)

    @cached_property
    def language_model(self) -> FrozenLanguageModel:
        """The target's language model, which reads the features."""
        spec, run = self.run.family.target, self.run
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        options = run.gradient_checkpointing, run.lora_baseline
        return FrozenLanguageModel(self.target, processor, run.family, *options)

    @cached_property
    def flow(self) -> FlowMatching:
        """The pipeline's transformer, through which edits are trained."""
        return FlowMatching(self.pipe, self.run.family.editor, self.run.gradient_checkpointing)

    def encode_function(self, kind: Kind) -> Encode:
        """The function that turns samples of a kind into the fields of a pack."""
        if kind == "perceive":
            return self.encoder.encode
        return lambda samples: [
            features | latents
            for features, latents in zip(self.encoder.encode(samples), self.flow.encode(samples), strict=True)
        ]


class TrainingJob:
    """A run with its frozen models and the features of its samples; the first process writes the result."""

    def __init__(
        self,
        run: RunConfig,
        settings: TrainingSettings,
        samples: dict[Kind, Split[Samples]],
        accelerator: Accelerator,
    ) -> None:
        self.run, self.settings, self.samples, self.accelerator = run, settings, samples, accelerator
        self.models = FrozenModels(run, accelerator.device)
        self.packs = self._packs()
        self._baseline_figures: dict[str, float] | None = None

    def calibrate(self) -> None:
        """Calibrate a bridge and choose its gate."""
        run, settings, models = self.run, self.settings, self.models
        fingerprint = {**run.fingerprint(), "seed": settings.seed}
        overwrite = run.overwrite_output_dir
        output, _ = open_run(run.output_dir, self.accelerator, fingerprint, overwrite=overwrite)
        if self.accelerator.is_main_process:
            config, pack = run.bridge_config, self.packs.train["perceive"]
            untrained = TrainableBridge(VisionBridge(config), run.features, seed=settings.seed)
            result = calibrate(config, lambda: token_stream(pack, untrained))
            train_data = TrainData(models.language_model, pack)
            bridge = result.bridge.to(models.device)
            trainable = TrainableBridge(bridge, run.features, run.strength, settings.seed)
            figures = {"gate": choose_gate(trainable, train_data)}
            figures |= validate(trainable, train_data, self.packs.validation, run.is_world)
            figures |= self._baseline(trainable, train_data)
            self._save(trainable, figures, 0, output, result)
        self.accelerator.wait_for_everyone()

    def train(self, resume: str | None) -> None:
        """Train from the start or from a checkpoint, to the end or until a signal."""
        run, packs, accelerator = self.run, self.packs.train, self.accelerator
        trainable = self._trainable()
        flow = self.models.flow if "edit" in packs else None
        train_data = TrainData(self.models.language_model, packs.get("perceive"), packs.get("edit"), flow)

        def validate_step(step: int) -> dict[str, float]:
            with trainer.averaged():
                if "edit" in packs and accelerator.is_main_process:
                    self._save_edits(trainable, step, trainer.output)
                figures = validate(trainable, train_data, self.packs.validation, run.is_world)
                return figures | self._baseline(trainable, train_data)

        fingerprint, overwrite = run.fingerprint(), run.overwrite_output_dir
        parts = (trainable, train_data, self.settings, accelerator, validate_step)
        trainer = Trainer(run.output_dir, *parts, fingerprint, overwrite)
        trainer.resume(resume)
        accelerator.init_trackers(trainer.output.tracker, config={})
        finished = trainer.run()
        accelerator.end_training()
        if finished and accelerator.is_main_process:
            figures = trainer.figures or validate_step(trainer.step)
            with trainer.averaged():
                self._save(trainable, figures, trainer.step, trainer.output)
        elif accelerator.is_main_process:
            print(f"stopped after step {trainer.step}; continue with --resume_from_checkpoint latest")

    def _packs(self) -> Split[dict[Kind, Pack]]:
        """Features of all samples; the first process computes what is missing, then the towers are freed."""
        run, packs = self.run, Split[dict[Kind, Pack]]({}, {})
        for kind, parts in self.samples.items():
            for part, result in zip(parts, packs, strict=True):
                key, name = pack_name(self.models.encoder.key(), kind, run.family, part)
                folder = (run.cache_dir or cache_home() / "packs") / name
                with self.accelerator.main_process_first():
                    encode = partial(self.models.encode_function, kind)
                    build_pack(folder, part, encode, key, run.dataloader_num_workers)
                result[kind] = Pack(folder, self.models.device)
        self.models.encoder.close()
        return packs

    def _trainable(self) -> Trainable:
        run, seed = self.run, self.settings.seed
        if run.lora_baseline:
            return LoraBaseline(self.models.target, run.bridge_config, seed)
        bridge = run.bridge or VisionBridge(replace(run.bridge_config, seed=seed))
        return TrainableBridge(bridge.to(self.models.device).float(), run.features, run.strength, seed)

    def _save_edits(self, trainable: Trainable, step: int, output: TrainingRun) -> None:
        """Save held-out edits without and with the current bridge into `samples/`; not for controls."""
        if not isinstance(trainable, TrainableBridge) or trainable.features != "own":
            return
        run, models, samples = self.run, self.models, self.samples["edit"].validation
        bridge = copy.deepcopy(trainable.bridge)
        pipeline = EnhancedQwenImageEdit(
            run.family, bridge, device=models.device, dtype=models.dtype, pipe=models.pipe, keep_source=True
        )
        for index in range(min(SAMPLE_EDITS, len(samples))):
            sample, name = samples[index], f"samples/step-{step:06d}-{index}.png"
            output.claim(name)
            pipeline.compare(sample.image, sample.prompt, output.folder / name, run.strength, seed=index)

    def _baseline(self, trainable: Trainable, train_data: TrainData) -> dict[str, float]:
        """The validation's figures without a bridge, measured once."""
        if self._baseline_figures is None:
            stock = trainable.switched_off() if isinstance(trainable, LoraBaseline) else nullcontext()
            with stock:
                figures = validate(None, train_data, self.packs.validation, self.run.is_world)
            self._baseline_figures = {f"{BASELINE}{name}": value for name, value in figures.items()}
        return self._baseline_figures

    def _save(
        self,
        trainable: Trainable,
        figures: dict[str, float],
        step: int,
        output: TrainingRun,
        fit: Calibration | None = None,
    ) -> None:
        """Write the result, with what `training.json` says in its card."""
        run, summary = self.run, self._summary(figures, step, fit)
        save_result(run.output_dir, partial(trainable.save, card=card_texts(summary)), output)
        output.claim(SUMMARY)
        write_json(run.output_dir / SUMMARY, summary)
        print(f"{run.output_dir}: {beside_baseline({f'validation/{k}': v for k, v in figures.items()})}")
        if not run.lora_baseline and run.features == "own":
            print(f"Use it: uv run python example_end_to_end.py --bridge {run.output_dir}")

    def _summary(self, figures: dict[str, float], step: int, fit: Calibration | None) -> dict[str, object]:
        """Provenance, settings and validation figures, as plain data."""
        run, settings = self.run, self.settings
        device = device_name("cuda" if torch.cuda.is_available() else "cpu")
        source, target = run.family.source.name, run.family.target.name
        summary = provenance([settings.seed], device, family=run.family.name, source=source, target=target)
        summary |= {name: getattr(run, name) for name in ("method", "features", "lora_baseline", "strength")}
        summary |= {
            "repos": {role: getattr(run.family, role).repo for role in ("source", "target")},
            "samples": {kind: len(parts.train) for kind, parts in self.samples.items()},
            "held_out": {kind: len(parts.validation) for kind, parts in self.samples.items()},
            "steps": step,
            "settings": asdict(settings),
            "validation": {name: value for name, value in figures.items() if BASELINE not in name},
            "baseline": {k.removeprefix(BASELINE): v for k, v in figures.items() if BASELINE in k},
        }
        if fit is not None:
            summary["calibration"] = {k: v for k, v in fit._asdict().items() if k != "bridge"}
        return summary
