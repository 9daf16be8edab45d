"""Gradient training of a bridge through the frozen models: they stay as they are, bit for bit.

Everything random in a step follows from (seed, step), and every process knows the whole batch of a step: a
resumed run repeats what an unbroken one does, and several processes do what one would. Only packs of frozen
features are read, so neither vision tower is in memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpointing import load_checkpoint, save_checkpoint
from .config import TrainingSettings
from .losses import Batch, TrainData
from .run_folder import LOG, TrainingRun, open_run
from .stopping import stop_requests
from .trainable import Learner


class NotFiniteError(ValueError):
    """A loss or gradient is infinite or not a number."""


class Trainer:
    """One training run in a folder.

    Args:
        accelerator: of `accelerate`: devices, processes, mixed precision, trackers.
        validate: step → plain figures, called as the settings say and after the last step.
        fingerprint: what makes the run this one and no other, beside the seed.
        overwrite: replace the run that the folder holds.
    """

    output: TrainingRun
    """The run in its folder, from `resume` or `run` on."""

    def __init__(
        self,
        folder: str | Path,
        learner: Learner,
        train_data: TrainData,
        settings: TrainingSettings,
        accelerator: Any,
        validate: Callable[[int], dict[str, float]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.learner, self.train_data, self.settings = (
            Path(folder),
            learner,
            train_data,
            settings,
        )
        self.accelerator, self.validate = accelerator, validate
        self.fingerprint, self.overwrite = {**(fingerprint or {}), "seed": settings.seed}, overwrite
        self.parameters = learner.parameters()
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        rest = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.learning_rate, weight_decay=0.0
        )
        self._rate = _schedule(settings, self.optimizer)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        self._sums: dict[str, Tensor] = {}

    def run(self) -> bool:
        """Train to the last step, or until SIGINT or SIGTERM, and save.

        Returns:
            Whether all steps are done.

        Raises:
            NotFiniteError: a loss or gradient is not finite; the last good checkpoint stays.
            OSError: a checkpoint could not be written; the one before stays.
            FileExistsError: the folder holds another run, see `runs.check_output_dir`.
        """
        if not hasattr(self, "output"):
            self.resume(None)
        settings, since = self.settings, (time.perf_counter(), self.step)
        with stop_requests() as asked:
            while self.step < settings.max_train_steps and not self._any(bool(asked)):
                self._advance()
                self.step += 1
                done = self.step == settings.max_train_steps
                saving = self.step % settings.checkpointing_steps == 0
                validating = settings.validation_steps and self.step % settings.validation_steps == 0
                logging = self.step % settings.log_every == 0 or done or saving
                if logging:
                    self._log(*since)
                if saving and not done:
                    self.save()
                if self.validate is not None and (validating or done):
                    self._report({f"validation/{k}": v for k, v in self.validate(self.step).items()})
                if logging:
                    since = (time.perf_counter(), self.step)
        if self._sums:
            self._log(*since)  # which also looks whether all is finite
        self.save()
        return self.step >= settings.max_train_steps

    def save(self) -> None:
        """Write a checkpoint; the first process does, and the others wait."""
        if self.accelerator.is_main_process:
            tensors = {f"average/{name}": tensor for name, tensor in self.average.items()}
            for name, parameter in self.parameters.items():
                tensors[f"parameter/{name}"] = parameter
                state = self.optimizer.state.get(parameter, {})
                tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}

            def write(folder: Path) -> None:
                with self.averaged():
                    self.learner.save(folder)

            state = {"settings": asdict(self.settings), "learnt": sorted(self.parameters)}
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.output, self.step, write, tensors, state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, given: str | None) -> bool:
        """Open the folder's run, and go on from a checkpoint (`runs.find_checkpoint`); whether there was one.

        Raises:
            FileNotFoundError: it is not there. OSError: damaged.
            ValueError: it is of another run or learner. FileExistsError: the folder is another run's.
        """
        self.output, found = open_run(
            self.folder,
            self.accelerator,
            self.fingerprint,
            given,
            self.overwrite,
            self.settings.max_train_steps,
        )
        if found is None:
            return False
        state, tensors = load_checkpoint(found)
        if state["learnt"] != sorted(self.parameters):
            raise ValueError(f"{found} is a checkpoint of something else: its parameters differ in name")
        self._say_what_changed(state["settings"])
        self.step = state["step"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if tensors[f"parameter/{name}"].shape != parameter.shape:
                    raise ValueError(f"{found} was made with other settings: {name} has another shape")
                parameter.copy_(tensors[f"parameter/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                if f"exp_avg/{name}" in tensors:
                    moments = {
                        key: tensors[f"{key}/{name}"].to(parameter.device)
                        for key in ("exp_avg", "exp_avg_sq")
                    }
                    count = torch.tensor(float(self.step))
                    self.optimizer.state[parameter] = {"step": count, **moments}
        return True

    def _say_what_changed(self, before: dict[str, Any]) -> None:
        """A resumed run may go on with other settings, but not in silence."""
        changes = [
            f"{name} {before.get(name)} → {value}"
            for name, value in asdict(self.settings).items()
            if before.get(name) != value
        ]
        if changes and self.accelerator.is_main_process:
            print(f"resumed with other settings: {', '.join(changes)}", flush=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged parameters in the learner for as long as this lasts, where an average is kept."""
        if not self.settings.use_ema:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def _advance(self) -> None:
        """One optimiser step over this process's share of the step's samples."""
        settings, world = self.settings, self.accelerator.num_processes
        whole = settings.train_batch_size * world * settings.gradient_accumulation_steps
        self.optimizer.zero_grad(set_to_none=True)
        plans = [Batch(self.train_data, kind, self.step, whole, settings) for kind in self.train_data.rows]
        for turn in range(settings.gradient_accumulation_steps):
            place = (turn * world + self.accelerator.process_index) * settings.train_batch_size
            part = slice(place, place + settings.train_batch_size)
            for plan in plans:
                with self.accelerator.autocast():
                    losses, figures = plan.losses(self.learner, part)
                sum(losses.values()).backward()
                for name, value in {**losses, **figures}.items():
                    self._note(name, value.detach().float())
        self._share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.max_grad_norm)
        self._note("norm", norm / self.accelerator.num_processes)
        factor = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)

    def _share_gradients(self) -> None:
        """Add up the gradients of all processes; each has divided by the whole batch already."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in self.parameters.values()])
        flat = self.accelerator.reduce(flat, reduction="sum")
        sizes = [p.numel() for p in self.parameters.values()]
        for parameter, part in zip(self.parameters.values(), flat.split(sizes), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _log(self, began: float, first: int) -> None:
        """Means of the steps since the last log, written down; refuses what is not finite."""
        count = max(self.step - first, 1)
        names = sorted(self._sums)
        if not names:
            return
        sums = torch.stack([self._sums[name].float() for name in names])
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._sums = {}
        means = {name: value / count for name, value in zip(names, sums, strict=True)}
        if not all(map(math.isfinite, means.values())):
            bad = {name: value for name, value in means.items() if not math.isfinite(value)}
            raise NotFiniteError(
                f"not finite in the steps up to {self.step}: {bad}. Nothing of it was saved: resume from the "
                "last checkpoint with a lower learning rate, or in another precision"
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self._report({**means, "lr": rate, "steps_per_second": count / (time.perf_counter() - began)})

    def _report(self, figures: dict[str, float]) -> None:
        self.accelerator.log(figures, step=self.step)
        if self.accelerator.is_main_process:
            self.output.claim(LOG)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"step {self.step}/{self.settings.max_train_steps}  {shown}", flush=True)

    def _any(self, stop: bool) -> bool:
        """Whether any process was asked to stop; all of them find the same."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def _schedule(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Step → share of the learning rate, by transformers' schedules: functions of the step alone."""
    from transformers import get_scheduler

    scheduler = get_scheduler(
        settings.lr_scheduler, optimizer, settings.lr_warmup_steps, settings.max_train_steps
    )
    share = scheduler.lr_lambdas[0]
    return lambda step: share(step + 1) if step < settings.lr_warmup_steps else share(step)
