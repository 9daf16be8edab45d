"""How a bridge is trained: plain numbers and their checks; nothing heavy is imported for them."""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import check_seed

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class TrainingSettings:
    """How a learner is trained; the defaults are those of the miniature's first bridge, see its card."""

    max_train_steps: int = 1000
    train_batch_size: int = 32
    """Samples a step and process, before accumulation."""
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    use_ema: bool = False
    ema_decay: float = 0.995
    condition_dropout: float = 0.1
    """How often an edit's instruction is left out, as guidance does at inference."""
    edit_weight: float = 10.0
    """Of the edit's loss beside that of the answers: the miniature's gradients are 20 to 35 times smaller."""
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    validation_steps: int = 0
    """0 validates after the last step alone."""
    log_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "log_every",
        )
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number from 1, not {getattr(self, name)!r}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)!r}")
        for name in ("condition_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share from 0 to below 1, not {getattr(self, name)!r}")
        check_seed(self.seed)
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"lr_scheduler is one of {', '.join(SCHEDULES)}, not {self.lr_scheduler!r}")
