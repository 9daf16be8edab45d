"""What a run trains and from which data (`RunConfig`), and how it trains (`TrainingSettings`).

Torch is not imported, so that a wrong flag is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ..specs import Family, check_seed

if TYPE_CHECKING:
    from ..bridge import BridgeConfig, VisionBridge

Kind = Literal["perceive", "edit"]
Method = Literal["calibrate", "perceive", "edit", "perceive+edit"]
Control = Literal["own", "shuffled", "target"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
WORLD_SAMPLES = 12_000
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class RunConfig:
    """What a run trains, from which data and by which method."""

    family: Family
    method: Method
    """In closed form, or by the loss of answers, of edits, or of both."""
    output_dir: Path
    bridge: VisionBridge | None = None
    """The bridge to continue from; None trains a new one."""
    config: BridgeConfig | None = None
    """The config of a new bridge; None is the family's."""
    features: Control = "own"
    """What the bridge sees: the source's levels, another sample's, or the target's own features."""
    lora_baseline: bool = False
    """Train a LoRA of the bridge's size on the target's language model instead."""
    strength: float = 1.0
    """Strength of the bridge's update while training."""
    highres_target: bool = False
    """Calibrate to the target's features of the image at a higher resolution."""
    train_data_dir: Path | None = None
    """Folder with `metadata.jsonl`, see `data.py`."""
    dataset_name: str | None = None
    """Hugging Face dataset with the same columns."""
    max_train_samples: int | None = None
    """None is all of the user's data, or `WORLD_SAMPLES` of the synthetic world."""
    validation_samples: int = 256
    """At most so many samples are held out."""
    cache_dir: Path | None = None
    """Folder of cached features; None is the toolkit's own."""
    dataloader_num_workers: int = 0
    """Processes that read or render images; 0 is the training process itself."""
    load_in_8bit: bool = False
    """Quantise the frozen models; needs CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations of the frozen models: less memory, slower."""
    overwrite_output_dir: bool = False
    """Replace the run that `output_dir` holds; only its own files are removed."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is one of {', '.join(get_args(Method))}, not {self.method!r}")
        if self.lora_baseline and (self.method == "calibrate" or self.features != "own" or self.bridge):
            raise ValueError("a LoRA has no bridge: it excludes --bridge, --features and calibration")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"max_train_samples is a whole number from 1, not {self.max_train_samples}")
        if self.train_data_dir and self.dataset_name:
            raise ValueError("give --train_data_dir or --dataset_name, not both")
        if self.method == "calibrate" and self.features == "target" and not self.highres_target:
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
        kinds = "perceive" if self.method == "calibrate" else self.method
        return cast("tuple[Kind, ...]", tuple(kinds.split("+")))

    @property
    def bridge_config(self) -> BridgeConfig:
        """The config of the bridge that is trained."""
        from ..bridge import BridgeConfig

        if self.bridge is not None:
            return self.bridge.config
        return self.config or BridgeConfig.for_family(self.family)

    def fingerprint(self) -> dict[str, Any]:
        """Values that a resumed run must share; `Trainer` adds the seed.

        A data folder's path is not among them: it may be moved between two parts of a run.
        """
        specs = {role: getattr(self.family, role) for role in ("source", "target", "editor")}
        own = ("method", "features", "lora_baseline", "strength", "highres_target")
        data = ("dataset_name", "max_train_samples", "validation_samples")
        return {
            **json.loads(json.dumps(asdict(self.bridge_config))),  # tuples become lists, as on disk
            **{role: [spec.repo, spec.revision] for role, spec in specs.items() if spec},
            **{name: getattr(self, name) for name in (*own, *data)},
            "own_data": self.train_data_dir is not None,
        }


@dataclass(frozen=True)
class TrainingSettings:
    """How a bridge is trained; the defaults are those of the miniature's first bridge, see its card."""

    max_train_steps: int = 1000
    train_batch_size: int = 32
    """Samples a step and process, before accumulation."""
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    lr_scheduler: Schedule = "cosine"
    lr_warmup_steps: int = 50
    weight_decay: float = 0.01
    """AdamW's, on matrices alone."""
    max_grad_norm: float = 1.0
    use_ema: bool = False
    """Save and validate the moving average of the parameters."""
    ema_decay: float = 0.995
    condition_dropout: float = 0.1
    """Share of edits that are trained with an empty prompt, as guidance uses it at inference."""
    edit_weight: float = 10.0
    """Weight of the edit loss beside the answer loss, whose gradients are 20 to 35 times larger."""
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    """Older checkpoints are removed; None keeps all."""
    validation_steps: int = 0
    """0 validates after the last step only."""
    log_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "checkpointing_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number from 1, not {getattr(self, name)!r}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)!r}")
        for name in ("condition_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share from 0 to below 1, not {getattr(self, name)!r}")
        check_seed(self.seed)
        if self.lr_scheduler not in get_args(Schedule):
            raise ValueError(
                f"lr_scheduler is one of {', '.join(get_args(Schedule))}, not {self.lr_scheduler!r}"
            )


def check_data_folder(folder: Path) -> None:
    """Refuse a training folder without its metadata file.

    Raises:
        FileNotFoundError: no such folder, or no `metadata.jsonl` in it.
    """
    if not (folder / METADATA).is_file():
        problem = f"{folder} has no {METADATA}" if folder.is_dir() else f"no such folder: {folder}"
        raise FileNotFoundError(
            f"{problem}; each of its lines has image, question, answer or image, instruction, target"
        )
