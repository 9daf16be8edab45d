"""Gradient training of a bridge through frozen models, whose weights never change.

Everything random in a step follows from (seed, step), and every process knows the whole batch of a step: a
resumed run repeats what an unbroken one does, and several processes do what one would. Only packs of frozen
features are read, so neither vision tower is in memory.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..io import duration
from .card import beside_baseline
from .checkpointing import load_checkpoint, save_checkpoint
from .config import TrainingSettings
from .losses import Batch, TrainData
from .run_folder import LOG, TrainingRun, open_run
from .trainable import Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


class NotFiniteError(ValueError):
    """A loss or gradient is infinite or not a number."""


class Trainer:
    """One training run in a folder.

    Args:
        accelerator: devices, processes, mixed precision and trackers.
        validate: step → figures, called as the settings say and after the last step.
        fingerprint: values that a resumed run must share, beside the seed.
        overwrite: replace the run that the folder holds.
    """

    output: TrainingRun
    """The run in its folder, from `resume` or `run` on."""

    def __init__(
        self,
        folder: str | Path,
        trainable: Trainable,
        train_data: TrainData,
        settings: TrainingSettings,
        accelerator: Accelerator,
        validate: Callable[[int], dict[str, float]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.trainable, self.train_data = Path(folder), trainable, train_data
        self.settings, self.accelerator, self.validate = settings, accelerator, validate
        self.fingerprint, self.overwrite = {**(fingerprint or {}), "seed": settings.seed}, overwrite
        self.parameters = trainable.parameters()
        self.optimizer = _optimizer(self.parameters, settings)
        self._lr_factor = _lr_schedule(settings, self.optimizer)
        self._trained = nn.ParameterList(self.parameters.values())  # shares the parameters
        self.ema = AveragedModel(self._trained, multi_avg_fn=self._update_average)
        self.ema.update_parameters(self._trained)  # the first call copies
        self.step = 0
        self.figures: dict[str, float] = {}
        """Of the last validation."""
        self._sums: dict[str, Tensor] = {}

    def run(self) -> bool:
        """Train to the last step, or until SIGINT or SIGTERM, and save.

        Returns:
            Whether all steps are done.

        Raises:
            NotFiniteError: a loss or gradient is not finite; the last good checkpoint stays.
            OSError: a checkpoint could not be written; the one before stays.
            FileExistsError: the folder holds another run, see `run_folder.check_output_dir`.
        """
        if not hasattr(self, "output"):
            self.resume(None)
        settings, logged = self.settings, (time.perf_counter(), self.step)
        self._began = logged
        with stop_requests() as signals:
            while self.step < settings.max_train_steps and not self._any_process(bool(signals)):
                self._training_step()
                self.step += 1
                done = self.step == settings.max_train_steps
                saving = self.step % settings.checkpointing_steps == 0
                validating = settings.validation_steps and self.step % settings.validation_steps == 0
                logging = self.step % settings.log_every == 0 or done or saving
                if logging:
                    self._log_losses(*logged)
                if saving and not done:
                    self.save()
                if self.validate is not None and (validating or done):
                    self.figures = self.validate(self.step)
                    self._log({f"validation/{name}": value for name, value in self.figures.items()})
                if logging:
                    logged = (time.perf_counter(), self.step)
        if self._sums:
            self._log_losses(*logged)  # also checks that the last steps are finite
        self.save()
        return self.step >= settings.max_train_steps

    def save(self) -> None:
        """Write a checkpoint; the first process does, and the others wait."""
        if self.accelerator.is_main_process:
            state = {"settings": asdict(self.settings), "trained": sorted(self.parameters)}
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.output, self.step, self._write_weights, self._state_tensors(), state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: str | None) -> bool:
        """Open the folder's run and load a checkpoint (see `find_checkpoint`); return whether there was one.

        Raises:
            FileNotFoundError: no such checkpoint. OSError: it is damaged.
            ValueError: it is of another run or model. FileExistsError: the folder is another run's.
        """
        last_step = self.settings.max_train_steps
        self.output, path = open_run(
            self.folder, self.accelerator, self.fingerprint, checkpoint, self.overwrite, last_step
        )
        if path is None:
            return False
        state, tensors = load_checkpoint(path)
        shapes = {name: tensors[f"parameter/{name}"].shape for name in state.get("trained", ())}
        if shapes != {name: parameter.shape for name, parameter in self.parameters.items()}:
            raise ValueError(f"{path} is of another model: its parameters have other names or shapes")
        saved, current = state["settings"], asdict(self.settings)
        changes = [f"{k} {saved.get(k)} → {v}" for k, v in current.items() if saved.get(k) != v]
        if changes and self.accelerator.is_main_process:
            print(f"resumed with other settings: {', '.join(changes)}", flush=True)
        self.step = state["step"]
        self._load_state_tensors(tensors)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged parameters into the model for the `with` block, if `use_ema` is on."""
        if not self.settings.use_ema:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.parameters.values()]
        try:
            self._set_parameters(self.ema.module)
            yield
        finally:
            self._set_parameters(current)

    @torch.no_grad()
    def _set_parameters(self, values: nn.ParameterList | list[Tensor]) -> None:
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.copy_(value)

    def _training_step(self) -> None:
        """One optimiser step over this process's share of the step's samples."""
        settings, world = self.settings, self.accelerator.num_processes
        size = settings.train_batch_size * world * settings.gradient_accumulation_steps
        self.optimizer.zero_grad(set_to_none=True)
        batches = [Batch(self.train_data, kind, self.step, size, settings) for kind in self.train_data.packs]
        for turn in range(settings.gradient_accumulation_steps):
            first = (turn * world + self.accelerator.process_index) * settings.train_batch_size
            part = slice(first, first + settings.train_batch_size)
            for batch in batches:
                with self.accelerator.autocast():
                    losses, metrics = batch.losses(self.trainable, part)
                sum(losses.values()).backward()
                self._add_to_log(**losses, **metrics)
        self._sum_gradients()
        norm = nn.utils.clip_grad_norm_(list(self._trained), settings.max_grad_norm)
        self._add_to_log(norm=norm / world)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._lr_factor(self.step)
        self.optimizer.step()
        self.ema.update_parameters(self._trained)

    def _update_average(self, averages: list[Tensor], current: list[Tensor], _count: Tensor | int) -> None:
        """Move the averages towards the parameters, with a decay that rises from 0.1 to `ema_decay`."""
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _sum_gradients(self) -> None:
        """Sum the gradients of all processes; each has divided by the whole batch already."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = nn.utils.parameters_to_vector([parameter.grad for parameter in self._trained])
        flat = self.accelerator.reduce(flat, reduction="sum")
        nn.utils.vector_to_parameters(flat, [parameter.grad for parameter in self._trained])

    def _write_weights(self, folder: Path) -> None:
        with self.averaged():
            self.trainable.save(folder)

    def _state_tensors(self) -> dict[str, Tensor]:
        """Parameters, their average and the optimiser's moments, by name."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.parameters.items(), self.ema.module, strict=True):
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
            tensors |= {f"parameter/{name}": parameter, f"average/{name}": average}
        return tensors

    @torch.no_grad()
    def _load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for (name, parameter), average in zip(self.parameters.items(), self.ema.module, strict=True):
            parameter.copy_(tensors[f"parameter/{name}"])
            average.copy_(tensors[f"average/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}

    def _add_to_log(self, **figures: Tensor) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def _log_losses(self, since: float, since_step: int) -> None:
        """Log the means of the steps since the last log; refuse values that are not finite."""
        count, names = max(self.step - since_step, 1), sorted(self._sums)
        if not names:
            return
        sums = torch.stack([self._sums[name] for name in names])
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._sums = {}
        means = {name: value / count for name, value in zip(names, sums, strict=True)}
        if bad := {name: value for name, value in means.items() if not math.isfinite(value)}:
            raise NotFiniteError(
                f"not finite in the steps up to {self.step}: {bad}. They are not saved: resume from the "
                "last checkpoint with a lower learning rate, or in another precision"
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self._log({**means, "lr": rate, "steps_per_second": count / (time.perf_counter() - since)})

    def _log(self, figures: dict[str, float]) -> None:
        self.accelerator.log(figures, step=self.step)
        if self.accelerator.is_main_process:
            self.output.claim(LOG)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
            line = f"step {self.step}/{self.settings.max_train_steps}  {beside_baseline(figures)}"
            print(f"{line}  {self._time_left()}".rstrip(), flush=True)

    def _time_left(self) -> str:
        """How long the remaining steps take, with validations and checkpoints, as the ones so far did."""
        (began, first), left = self._began, self.settings.max_train_steps - self.step
        if left <= 0 or self.step <= first:
            return ""
        seconds = (time.perf_counter() - began) / (self.step - first) * left
        return f"about {duration(seconds)} left"

    def _any_process(self, stop: bool) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collect the names of the first SIGINT or SIGTERM; a second one acts as usual."""
    names: list[str] = []

    def request(number: int, _frame: object) -> None:
        names.append(signal.Signals(number).name)
        signal.signal(number, handlers[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():  # only that one can handle signals
        yield names
        return
    handlers = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield names
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _optimizer(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    decays = ((matrices, settings.weight_decay), (vectors, 0.0))
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _lr_schedule(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Step → factor of the learning rate, from transformers' schedules: a function of the step alone."""
    from transformers import get_scheduler

    warmup, steps = settings.lr_warmup_steps, settings.max_train_steps
    factor = get_scheduler(settings.lr_scheduler, optimizer, warmup, steps).lr_lambdas[0]
    return lambda step: factor(step + 1) if step < warmup else factor(step)
