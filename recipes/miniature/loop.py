"""A resumable optimisation loop for small models, whose steps are bound by kernel launches.

On CUDA every step (forward, backward, clipping, AdamW, average) is one CUDA graph per layout of the batch.
Checkpoints are safetensors and JSON, nothing pickled. As a script it draws a folder's loss curves:

    python recipes/miniature/loop.py FOLDER
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_vision_bridge.training.stopping import stop_requests

from . import peers
from .checkpoint import fill, read_checkpoint, write_checkpoint
from .journal import plot_log, write_row
from .muon import is_hidden
from .stepper import Loss, Stepper

__all__ = ["Loop", "Settings", "plot_log"]

REWARM_STEPS = 100  # without its moments, Adam's first steps have full size


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast; `minutes` bounds one call of `run`, `ema` is the average's final decay.

    `muon` is how many times the rate Muon takes for matrices between hidden states; at 0 AdamW has them too.
    Peers (see `peers.py`) average what they have every `share_every` steps.

    With `cosine_minutes` the learning rate falls with the time trained, over all calls, and not with the
    steps: for a device that is lent by the minute. Such a run is repeatable only as far as its speed is.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    muon: float = 0.0
    share_every: int = 8
    minutes: float | None = None
    cosine_minutes: float | None = None
    log_every: int = 50
    seed: int

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step counted from 0: linear warm-up times cosine to 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        gone = step / self.steps if self.cosine_minutes is None else seconds / (60 * self.cosine_minutes)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(gone, 1)))


class Loop:
    """Trains `model`'s fp32 parameters on `loss`; the model is on its device already.

    Random numbers inside `loss` must come from the device's default generator: graphs know that one alone.
    It is seeded anew with (seed, step) before every step, so that a resumed run draws what an unbroken one
    would. `loss` must not synchronise, and returns the same names each time, among them `loss`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        loss: Loss,
        settings: Settings,
        *,
        graphs: bool = True,
        light: bool | None = None,
    ) -> None:
        """`light` keeps moments and average on disk in bf16 (the default on CUDA) instead of fp32."""
        self.folder, self.model, self.settings = Path(folder), model, settings
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if wrong := [name for name, p in self._trained.items() if p.dtype != torch.float32]:
            raise ValueError(f"parameters are trained in float32, these are not: {wrong[:5]}")
        hidden = [p for name, p in self._trained.items() if settings.muon and is_hidden(name, p)]
        self._stepper = Stepper(
            list(self._trained.values()),
            loss,
            settings.betas,
            settings.weight_decay,
            settings.clip,
            graphs,
            hidden,
            settings.muon,
        )
        self.device = self._stepper.device
        self.light = self._stepper.is_cuda if light is None else light
        self.step, self.seconds = 0, 0.0
        self._rewarm_from: int | None = None

    def run(
        self,
        batches: Callable[[int], dict[str, Tensor]],
        on_log: Callable[[int, dict[str, float]], None] | None = None,
    ) -> bool:
        """Train to the last step, the end of `minutes`, or a signal (SIGINT, SIGTERM), and save.

        Args:
            batches: step → tensors on the device, of any of several layouts.
            on_log: called with the step and its row of the log after every `log_every` steps and the last.

        Returns:
            Whether all steps are done.

        Raises:
            FloatingPointError: the loss is not finite; the checkpoint stays as it was saved last.
        """
        began, before = time.perf_counter(), self.seconds
        since = (began, self.step)
        limit = math.inf if self.settings.minutes is None else self.settings.minutes * 60
        with stop_requests() as asked:
            while self.step < self.settings.steps:
                late = time.perf_counter() - began >= limit
                if self._share_and_ask(bool(asked) or late):
                    break
                torch.manual_seed((self.settings.seed + 7919 * peers.rank()) * 1_000_003 + self.step)
                rate = self._rate(before + time.perf_counter() - began)
                decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
                self._stepper.advance(batches(self.step), rate, decay)
                self.step += 1
                if self.step % self.settings.log_every == 0 or self.is_done:
                    self.seconds = before + time.perf_counter() - began
                    row = self._log(rate, *since)
                    if on_log is not None:
                        on_log(self.step, row)
                    since = (time.perf_counter(), self.step)
        self.seconds = before + time.perf_counter() - began
        why = f"asked to by {asked[0]}" if asked else "all steps done"
        print(f"stopped at step {self.step}: {why if asked or self.is_done else 'out of time'}", flush=True)
        self.save()
        return self.is_done

    @property
    def is_done(self) -> bool:
        """Whether all steps are."""
        return self.step >= self.settings.steps

    def _share_and_ask(self, stop: bool) -> bool:
        """Average with the peers when it is time to; whether any of them wants to stop."""
        if peers.count() == 1 or self.step % self.settings.share_every:
            return stop and peers.count() == 1
        moments = (m for p in self._stepper.parameters for m in self._stepper.moments(p).values())
        weights = (p.detach() for p in self._stepper.parameters)
        return peers.average([*weights, *self._stepper.average, *moments], stop)

    def _rate(self, seconds: float) -> float:
        rate = self.settings.rate(self.step, seconds)
        if self._rewarm_from is not None:
            rate *= min(1.0, (self.step - self._rewarm_from + 1) / REWARM_STEPS)
        return rate

    def _log(self, rate: float, since: float, since_step: int) -> dict[str, float]:
        """Fetch the means of the steps since the last log, print and keep them."""
        row = {"step": self.step, **self._stepper.take_means()}  # waits for the device
        speed = (self.step - since_step) / (time.perf_counter() - since)
        row |= {"lr": rate, "it/s": speed, "seconds": self.seconds}
        if self._stepper.is_cuda:
            row["gpu"] = torch.cuda.memory_reserved(self.device) / 1e9
        if peers.rank() == 0:
            write_row(self.folder, row, self.settings.steps)
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} in the steps up to {self.step}")
        return row

    def _whole(self) -> dict[str, Tensor]:
        """Every parameter, once, and every buffer that checkpoints carry."""
        kept = self.model.state_dict().keys()
        buffers = {name: tensor for name, tensor in self.model.named_buffers() if name in kept}
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()} | buffers

    def ema_weights(self) -> dict[str, Tensor]:
        """All weights, trained ones averaged: the loop's own tensors, to be copied and not changed."""
        return self._whole() | dict(zip(self._trained, self._stepper.average, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model, for as long as this lasts."""
        kept = [p.detach().clone() for p in self._stepper.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._stepper.parameters, self._stepper.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._stepper.parameters, kept)

    def save(self) -> None:
        """Write the checkpoint, the first peer's; the one before stays whole until this one is."""
        if peers.rank():
            return
        moments = {}
        for name, p in self._trained.items():
            moments |= {f"{name}/{key}": value for key, value in self._stepper.moments(p).items()}
        average = dict(zip(self._trained, self._stepper.average, strict=True))
        if self.light:
            moments, average = _in_bf16(moments), _in_bf16(average)
        state = {"step": self.step, "seconds": self.seconds, "updates": self._stepper.updates}
        kinds = {"weights": self._whole(), "ema": average, "moments": moments}
        write_checkpoint(self.folder, kinds, {**state, "settings": asdict(self.settings)})

    def resume(self) -> bool:
        """Load the folder's checkpoint, if there is one; say what of it is missing or differs.

        Raises:
            FileNotFoundError: a file of weights is gone.
            ValueError: the checkpoint is another model's.
        """
        if (found := read_checkpoint(self.folder)) is None:
            return False
        state, kinds = found
        if kinds["weights"] is None:
            raise FileNotFoundError(f"{self.folder}: state.json names weights that are not there")
        was, now = state["settings"], asdict(self.settings) | {"betas": list(self.settings.betas)}
        if changed := {name: (was.get(name), now[name]) for name in now if was.get(name) != now[name]}:
            print(f"settings that differ from the checkpoint's (was, is): {changed}", flush=True)
        self.step, self.seconds = state["step"], state["seconds"]
        fill(self._whole(), kinds["weights"])
        if kinds["ema"] is None:
            print("no average in the checkpoint: it begins anew from the weights", flush=True)
        trained = {name: p.detach() for name, p in self._trained.items()}
        fill(dict(zip(trained, self._stepper.average, strict=True)), kinds["ema"] or trained)
        self._set_moments(kinds["moments"], state["updates"])
        print(f"resumed at step {self.step} of {self.settings.steps}", flush=True)
        return True

    def _set_moments(self, moments: dict[str, Tensor] | None, updates: float) -> None:
        if moments is None:
            print(f"no moments in the checkpoint: {REWARM_STEPS} steps of warm-up again", flush=True)
            self._rewarm_from = self.step
            return
        if not updates:  # saved before the first step
            return
        of: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            of.setdefault(name, {})[kind] = value
        for name, p in self._trained.items():
            self._stepper.set_moments(p, of.get(name, {}), updates)


def _in_bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


if __name__ == "__main__":
    print(plot_log(Path(sys.argv[1])))
