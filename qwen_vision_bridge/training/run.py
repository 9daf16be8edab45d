"""A whole training run: from data and frozen models to a bridge in a folder that loads anywhere.

Data is checked before a model is loaded. Features of both towers are worked out once, into packs that later
runs on the same data find again; then the towers are freed, and what stays are the readers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..bridge import BridgeConfig, VisionBridge
from ..controls import Features
from ..distributed import LONGEST_WAIT
from ..io import digest_of, provenance, write_json
from ..runs import ABOUT, TrainingRun, check_output_dir, open_run
from ..specs import Family, cache_home
from .calibration import FOLDS, Calibration, Tokens, calibrate
from .checkpointing import save_result
from .config import TrainingSettings
from .data import DatasetSamples, FolderSamples, Kind, Samples, WorldSamples, held_out
from .frozen_models import FrozenModels
from .losses import TrainData
from .packs import Pack, build_pack
from .trainable import BridgeLearner, Learner, rival_of
from .validation import choose_gate, edit_error, examine, predict, summary

Method = Literal["calibrate", "perceive", "edit", "perceive+edit"]
METHODS = ("calibrate", "perceive", "edit", "perceive+edit")
WORLD_SAMPLES = 12_000
CALIBRATION_CHUNK = 4096  # tokens
ASKED = 64  # held-out questions of a user's own that are replied to in a validation
SAMPLES = 2  # held-out edits that are painted in a validation


@dataclass(frozen=True)
class RunConfig:
    """What is learnt, from what and by which way; `TrainingSettings` says how."""

    family: Family
    method: Method
    output_dir: Path
    bridge: VisionBridge | None = None
    """To continue from; None is a fresh one."""
    config: BridgeConfig | None = None
    """Of a fresh bridge; None is the family's."""
    features: Features = "own"
    rival: str | None = None
    """`lora` trains a LoRA of the bridge's size on the target's language model instead."""
    strength: float = 1.0
    teacher: bool = False
    """Calibrate on the target's features of the image seen finer."""
    train_data_dir: Path | None = None
    dataset_name: str | None = None
    max_train_samples: int | None = None
    """None is all of a user's data, and `WORLD_SAMPLES` of the world."""
    validation_samples: int = 256
    cache_dir: Path | None = None
    """Where packs of features go; None is the toolkit's own folder."""
    dataloader_num_workers: int = 0
    load_in_8bit: bool = False
    gradient_checkpointing: bool = False
    overwrite_output_dir: bool = False
    """Replace the run that the folder holds; its own files alone are removed."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.rival not in (None, "lora"):
            raise ValueError(f"the only rival is lora, not {self.rival!r}")
        if self.rival and (self.method == "calibrate" or self.features != "own" or self.bridge):
            raise ValueError("a rival has no bridge: it goes with no --bridge, --features or calibration")
        if self.train_data_dir and self.dataset_name:
            raise ValueError("give --train_data_dir or --dataset_name, not both")
        if self.method == "calibrate" and self.features == "target" and not self.teacher:
            raise ValueError(
                "a target-only bridge cannot be calibrated without --teacher: it would learn the identity"
            )

    @property
    def is_world(self) -> bool:
        """Whether the samples are the synthetic world's."""
        return self.train_data_dir is None and self.dataset_name is None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of samples that the method learns from."""
        return ("perceive",) if self.method == "calibrate" else tuple(self.method.split("+"))  # type: ignore[return-value]

    def fingerprint(self) -> dict[str, Any]:
        """What makes a run of this run that run and no other; `TrainingSettings` adds how it learns.

        A folder of data is not named by its path, since it may be moved between two parts of a run.
        """
        config = self.bridge.config if self.bridge is not None else self.config
        family, names = (
            self.family,
            (
                "method",
                "features",
                "rival",
                "strength",
                "teacher",
                "dataset_name",
                "max_train_samples",
                "validation_samples",
            ),
        )
        models = {
            role: [spec.repo, spec.revision]
            for role in ("source", "target", "editor")
            if (spec := getattr(family, role))
        }
        return {
            **json.loads(json.dumps(asdict(config or BridgeConfig.for_family(family)))),
            **models,
            **{name: getattr(self, name) for name in names},
            "own_data": self.train_data_dir is not None,
        }

    def samples(self, kind: Kind) -> tuple[Samples, Samples]:
        """Samples to learn from and to validate on, checked.

        Raises:
            FileNotFoundError, ValueError: what is wrong with the data.
        """
        if self.is_world:
            taught, size = self.family.name == "miniature", self.family.image_size
            counts = {"train": self.max_train_samples or WORLD_SAMPLES, "validation": self.validation_samples}
            train, validation = (WorldSamples(kind, s, n, taught, size) for s, n in counts.items())
            return train, validation
        given: Samples = (
            FolderSamples(self.train_data_dir, kind)
            if self.train_data_dir is not None
            else DatasetSamples(self.dataset_name, kind)
        )
        train, validation = held_out(given, self.validation_samples)
        if self.max_train_samples is not None:
            train.indices = train.indices[: self.max_train_samples]
        return train, validation


def train(run: RunConfig, settings: TrainingSettings, resume: str | None = None, **trackers: Any) -> Path:
    """Train as a run says and write what was learnt into its folder.

    Args:
        resume: a checkpoint's path or name, or `latest`.
        trackers: `mixed_precision` and `report_to`, as accelerate takes them.

    Returns:
        The folder, which `bridge=` and `--bridge` take.

    Raises:
        FileNotFoundError, ValueError, OSError: of data, models and disk, and of `Trainer`.
        FileExistsError: the folder holds another run or somebody else's files, see `runs.check_output_dir`.
    """
    calibrating, fingerprint = (run.method == "calibrate", {**run.fingerprint(), "seed": settings.seed})
    if calibrating and resume is not None:
        raise ValueError("a calibration has no checkpoints: leave --resume_from_checkpoint out")
    steps = 0 if calibrating else settings.max_train_steps
    check_output_dir(run.output_dir, resume, run.overwrite_output_dir, fingerprint, steps)
    samples = {kind: run.samples(kind) for kind in run.kinds}
    accelerator = _accelerator(run, **trackers)
    models = FrozenModels(run, accelerator.device)
    packs = {kind: _packs(run, models, kind, *samples[kind], accelerator) for kind in run.kinds}
    models.free_encoder()
    if calibrating:
        output, _ = open_run(run.output_dir, accelerator, fingerprint, overwrite=run.overwrite_output_dir)
        if accelerator.is_main_process:
            _calibrate(run, settings, models, *packs["perceive"], output)
        accelerator.wait_for_everyone()
        return run.output_dir
    _train(run, settings, models, packs, samples, accelerator, resume)
    return run.output_dir


def _train(
    run: RunConfig,
    settings: TrainingSettings,
    models: FrozenModels,
    packs: dict[str, tuple[Pack, Pack]],
    samples: dict[str, tuple[Samples, Samples]],
    accelerator: Any,
    resume: str | None,
) -> None:
    from .trainer import Trainer

    learner = _learner(run, settings, models, accelerator.device)
    trained, validated = ({kind: pair[n] for kind, pair in packs.items()} for n in (0, 1))
    flow = models.flow() if "edit" in run.kinds else None
    train_data = TrainData(models.reader(), trained.get("perceive"), trained.get("edit"), flow)
    validate = _validation(run, learner, train_data, validated)
    figures: dict[str, float] = {}

    def look(step: int) -> dict[str, float]:
        with trainer.averaged():
            if "edit" in run.kinds and accelerator.is_main_process:
                paint_samples(run, models, learner, samples["edit"][1], step, trainer.output)
            figures.update(validate(step))
        return figures

    trainer = Trainer(
        run.output_dir,
        learner,
        train_data,
        settings,
        accelerator,
        look,
        run.fingerprint(),
        run.overwrite_output_dir,
    )
    trainer.resume(resume)
    accelerator.init_trackers(trainer.output.tracker(), config={})
    finished = trainer.run()
    accelerator.end_training()
    if finished and accelerator.is_main_process:
        with trainer.averaged():
            save_result(run.output_dir, learner.save, trainer.output)
        _write_about(run, settings, figures or look(trainer.step), trainer.step, trainer.output)
    elif accelerator.is_main_process:
        print(f"stopped after step {trainer.step}: --resume_from_checkpoint latest goes on from there")


def _accelerator(run: RunConfig, mixed_precision: str | None = None, report_to: str | None = None) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    precision = mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    return Accelerator(
        mixed_precision=precision,
        log_with=report_to,
        project_dir=str(run.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


def _packs(
    run: RunConfig, models: FrozenModels, kind: Kind, train: Samples, validation: Samples, accelerator: Any
) -> tuple[Pack, Pack]:
    """The packs of both lists; the first process makes what is missing."""
    root = run.cache_dir or cache_home() / "packs"
    packs = []
    for samples in (train, validation):
        key, name = pack_name(models.encoder.key(), kind, run.family, samples)
        with accelerator.main_process_first():
            workers = run.dataloader_num_workers
            build_pack(root / name, samples, lambda: models.see(kind), key, workers)
        packs.append(Pack(root / name, models.device))
    return packs[0], packs[1]


def pack_name(encoder_key: str, kind: str, family: Family, samples: Samples) -> tuple[str, str]:
    """The key of what is seen of samples of a kind, and the name of the folder that their pack is kept in."""
    key = digest_of([encoder_key, kind, family.editor.name if kind == "edit" else ""])
    return key, digest_of([key, samples.digest, len(samples)])


def _learner(
    run: RunConfig, settings: TrainingSettings, models: FrozenModels, device: torch.device
) -> Learner:
    config = run.config or BridgeConfig.for_family(run.family)
    if run.rival:
        return rival_of(config, models.target, settings.seed)
    bridge = run.bridge or VisionBridge(replace(config, seed=settings.seed))
    return BridgeLearner(bridge.to(device).float(), run.features, run.strength, settings.seed)


def _validation(run: RunConfig, learner: Learner, train_data: TrainData, packs: dict[str, Pack]) -> Any:
    """Step → figures on held-out samples."""
    asked = ("read", None) if run.is_world else (None, ASKED)

    def validate(_step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        if "perceive" in packs:
            figures |= predict(learner, train_data, packs["perceive"])
            figures |= summary(examine(learner, train_data.reader, packs["perceive"], *asked))
        if "edit" in packs:
            held_out = TrainData(train_data.reader, None, packs["edit"], train_data.flow)
            figures["edit"] = edit_error(learner, held_out)
        return figures

    return validate


def _calibrate(
    run: RunConfig,
    settings: TrainingSettings,
    models: FrozenModels,
    train: Pack,
    held: Pack,
    output: TrainingRun,
) -> None:
    config = run.config or BridgeConfig.for_family(run.family)
    learner = BridgeLearner(VisionBridge(config), run.features, seed=settings.seed)
    found = calibrate(config, lambda: token_stream(train, learner))
    train_data = TrainData(models.reader(), train)
    learner = BridgeLearner(found.bridge.to(models.device), run.features, run.strength, settings.seed)
    gate = choose_gate(learner, train_data)
    figures = {"gate": gate, **_validation(run, learner, train_data, {"perceive": held})(0)}
    save_result(run.output_dir, learner.save, output)
    _write_about(run, settings, figures, 0, output, found)


def token_stream(pack: Pack, learner: BridgeLearner) -> Iterator[Tokens]:
    """All tokens of a pack, in chunks of whole images, with the levels that a learner sees."""
    for members in pack.layouts.values():
        rows, columns = pack.grid_of(members)
        images = min(CALIBRATION_CHUNK // (rows * columns), len(members) // (2 * FOLDS))
        for samples in members.split(max(images, 1)):
            baseline = pack.rows("vision", samples)
            levels = [level.flatten(0, 1).cpu() for level in learner.levels(pack, samples, baseline)]
            teacher = pack.rows("teacher", samples) if "teacher" in pack.fields else None
            yield Tokens(
                levels, baseline.flatten(0, 1).cpu(), None if teacher is None else teacher.flatten(0, 1).cpu()
            )


def paint_samples(
    run: RunConfig, models: FrozenModels, learner: Learner, samples: Samples, step: int, output: TrainingRun
) -> None:
    """Held-out edits without and with the bridge as it is now, into `samples/`; a control paints none."""
    import copy

    from ..pipeline import EnhancedQwenImageEdit

    if not isinstance(learner, BridgeLearner) or run.features != "own":
        return
    bridge = copy.deepcopy(learner.bridge)
    pipeline = EnhancedQwenImageEdit(
        run.family, bridge, device=models.device, dtype=models.dtype, pipe=models.pipe, keep_source=True
    )
    for index in range(min(SAMPLES, len(samples))):
        sample = samples[index]
        sheet = f"samples/step-{step:06d}-{index}.png"
        output.claim(sheet)
        pipeline.compare(sample.image, sample.prompt, output.folder / sheet, run.strength, seed=index)


def _write_about(
    run: RunConfig,
    settings: TrainingSettings,
    figures: dict[str, float],
    step: int,
    output: TrainingRun,
    calibration: Calibration | None = None,
) -> None:
    """`training.json`: what made the bridge beside it, and its figures on held-out samples."""
    device = "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    about = provenance(
        [settings.seed],
        device,
        family=run.family.name,
        source=run.family.source.name,
        target=run.family.target.name,
    )
    about |= {"method": run.method, "features": run.features, "rival": run.rival, "steps": step}
    about |= {"strength": run.strength, "settings": asdict(settings), "validation": figures}
    if calibration is not None:
        about["calibration"] = {k: v for k, v in calibration._asdict().items() if k != "bridge"}
    output.claim(ABOUT)
    write_json(run.output_dir / ABOUT, about)
    print(f"{run.output_dir}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
