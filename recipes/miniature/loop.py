"""A resumable training loop for small models, whose steps are bound by kernel launches.

On CUDA every step (forward, backward, clipping, optimisers, average) is one CUDA graph per layout of the
batch. That is why it is not the package's `Trainer`: a graph allows no AveragedModel, accelerate or gradient
accumulation, which read numbers on the host. Both share what they can, the handling of stop requests.

As a script it draws a folder's loss curves: `python -m recipes.miniature.loop FOLDER`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_vision_bridge.io import write_whole
from qwen_vision_bridge.training.trainer import stop_requests

from . import peers
from .muon import is_hidden
from .stepper import Loss, Stepper, copy_tensors

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
NOT_DRAWN = ("step", "lr", "it/s", "gpu", "seconds")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length and speed of a training run."""

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    """Final decay of the average."""
    muon: float = 0.0
    """Muon's rate for hidden matrices, in multiples of AdamW's; at 0 AdamW trains them too."""
    share_every: int = 8
    """Steps after which peers average their weights, see `peers.py`."""
    minutes: float | None = None
    """Time limit of one call of `run`."""
    cosine_minutes: float | None = None
    """The learning rate falls with the time trained, over all calls, and not with the steps: for a device
    that is lent by the minute. Such a run is as repeatable as its speed."""
    log_every: int = 50
    seed: int

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step counted from 0: linear warm-up times cosine to 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        gone = step / self.steps if self.cosine_minutes is None else seconds / (60 * self.cosine_minutes)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(gone, 1)))


class Loop:
    """Trains `model`'s fp32 parameters on `loss`; the model is on its device already.

    Random numbers inside `loss` must come from the device's default generator, the only one that graphs know.
    It is seeded with (seed, step) before every step, so that a resumed run draws what an unbroken one would.
    `loss` must not synchronise, and returns the same names each time, among them `loss`.
    """

    def __init__(
        self, folder: Path, model: nn.Module, loss: Loss, settings: Settings, *, graphs: bool = True
    ) -> None:
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
        self.step, self.seconds = 0, 0.0

    def run(
        self,
        batches: Callable[[int], dict[str, Tensor]],
        on_log: Callable[[int, dict[str, float]], None] | None = None,
    ) -> bool:
        """Train to the last step, the end of `minutes`, or a signal, and save; return whether all is done.

        Args:
            batches: step → tensors on the device, of any of several layouts.
            on_log: called with the step and its row of the log after every `log_every` steps and the last.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint stays.
        """
        began, before = time.perf_counter(), self.seconds
        since = (began, self.step)
        limit = math.inf if self.settings.minutes is None else self.settings.minutes * 60
        with stop_requests() as signals:
            while self.step < self.settings.steps:
                is_late = time.perf_counter() - began >= limit
                if self._share_weights(bool(signals) or is_late):
                    break
                torch.manual_seed((self.settings.seed + 7919 * peers.rank()) * 1_000_003 + self.step)
                rate = self.settings.rate(self.step, before + time.perf_counter() - began)
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
        reason = signals[0] if signals else "all steps done" if self.is_done else "out of time"
        print(f"stopped at step {self.step}: {reason}", flush=True)
        self.save()
        return self.is_done

    @property
    def is_done(self) -> bool:
        """Whether all steps are."""
        return self.step >= self.settings.steps

    def _share_weights(self, stop: bool) -> bool:
        """Average with the peers when it is time to; return whether any of them wants to stop."""
        if peers.count() == 1 or self.step % self.settings.share_every:
            return stop and peers.count() == 1
        moments = (m for p in self._stepper.parameters for m in self._stepper.moments(p).values())
        weights = (p.detach() for p in self._stepper.parameters)
        return peers.average([*weights, *self._stepper.average, *moments], stop)

    def _log(self, rate: float, since: float, since_step: int) -> dict[str, float]:
        """Print and write the means of the steps since the last log."""
        row = {"step": self.step, **self._stepper.take_means()}  # waits for the device
        speed = (self.step - since_step) / (time.perf_counter() - since)
        row |= {"lr": rate, "it/s": speed, "seconds": self.seconds}
        if self._stepper.is_cuda:
            row["gpu"] = torch.cuda.memory_reserved(self.device) / 1e9  # GB
        if peers.rank() == 0:
            scalars = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            print(f"step {self.step}/{self.settings.steps}  {scalars}", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} in the steps up to {self.step}")
        return row

    def _weights(self) -> dict[str, Tensor]:
        """Every parameter, once, and every persistent buffer."""
        persistent = self.model.state_dict().keys()
        buffers = {name: tensor for name, tensor in self.model.named_buffers() if name in persistent}
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()} | buffers

    def ema_weights(self) -> dict[str, Tensor]:
        """All weights, trained ones averaged: the loop's own tensors, to be copied and not changed."""
        return self._weights() | dict(zip(self._trained, self._stepper.average, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for the `with` block."""
        current = [p.detach().clone() for p in self._stepper.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._stepper.parameters, self._stepper.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._stepper.parameters, current)

    def save(self) -> None:
        """Write the checkpoint, the first peer's, whole or not at all."""
        if peers.rank():
            return
        tensors = {f"weights/{name}": tensor for name, tensor in self._weights().items()}
        for (name, p), average in zip(self._trained.items(), self._stepper.average, strict=True):
            tensors[f"ema/{name}"] = average
            tensors |= {f"{key}/{name}": value for key, value in self._stepper.moments(p).items()}
        state = {"step": self.step, "seconds": self.seconds, "updates": self._stepper.updates}
        metadata = {"state": json.dumps({**state, "settings": asdict(self.settings)})}
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.folder / CHECKPOINT, lambda path: save_file(plain, path, metadata))

    def resume(self) -> bool:
        """Load the folder's checkpoint, if there is one, and print the settings that differ.

        Raises:
            ValueError: the checkpoint is another model's.
        """
        if not (self.folder / CHECKPOINT).exists():
            return False
        kinds: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.folder / CHECKPOINT, "pt") as file:
            state = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, _, name = key.partition("/")
                kinds.setdefault(kind, {})[name] = file.get_tensor(key)
        old, new = state["settings"], asdict(self.settings) | {"betas": list(self.settings.betas)}
        if changed := {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}:
            print(f"settings that differ from the checkpoint's (old, new): {changed}", flush=True)
        self.step, self.seconds = state["step"], state["seconds"]
        copy_tensors(kinds.pop("weights"), self._weights())
        copy_tensors(kinds.pop("ema"), dict(zip(self._trained, self._stepper.average, strict=True)))
        if state["updates"]:
            for name, p in self._trained.items():
                moments = {kind: values[name] for kind, values in kinds.items() if name in values}
                self._stepper.set_moments(p, moments, state["updates"])
        print(f"resumed at step {self.step} of {self.settings.steps}", flush=True)
        return True


def plot_log(folder: Path) -> Path:
    """Draw every scalar of the log over the steps into loss.png.

    Raises:
        FileNotFoundError: the folder has no log.
    """
    from matplotlib.figure import Figure

    lines = (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}  # a resumed run repeats unsaved steps
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(name for row in rows.values() for name in row if name not in NOT_DRAWN):
        points = sorted((step, row[name]) for step, row in rows.items() if name in row)
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axis.set(yscale="log", xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(Path(folder) / "loss.png", dpi=110)
    return Path(folder) / "loss.png"


if __name__ == "__main__":
    print(plot_log(Path(sys.argv[1])))
