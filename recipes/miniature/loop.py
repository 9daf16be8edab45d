"""A resumable training loop on accelerate: bf16 on CUDA, one process or several, averaged weights.

It trains whole small models from scratch, with Muon and a learning rate that may follow the clock; the
package's `Trainer` trains a bridge on packs of frozen features. Both share the handling of stop requests.

As a script it draws a folder's loss curves: `python -m recipes.miniature.loop FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from qwen_vision_bridge.io import write_image, write_whole
from qwen_vision_bridge.training.trainer import stop_requests

from .feed import Batches

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
NOT_DRAWN = ("step", "lr", "it/s", "gpu", "seconds")
# Matrices that read inputs, write outputs or set norms: AdamW's, as is usual.
NOT_HIDDEN = ("embed", "_in.", "proj_out", "norm_out", "_mod.", "time_text", "lm_head")

Batch = dict[str, Tensor]
Loss = Callable[[Batch], dict[str, Tensor]]


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
    minutes: float | None = None
    """Time limit of one call of `run`."""
    cosine_minutes: float | None = None
    """The learning rate falls with the time trained, over all calls, and not with the steps: for a device
    that is lent by the minute. Such a run is as repeatable as its speed."""
    log_every: int = 50
    seed: int

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace, seed: int) -> Settings:
        """Take the settings that a stage has flags for."""
        names = ("steps", "learning_rate", "minutes", "cosine_minutes", "log_every", "weight_decay", "muon")
        flags = vars(arguments)
        return cls(seed=seed, **{name: flags[name] for name in names if name in flags})

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step counted from 0: linear warm-up times cosine to 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        gone = step / self.steps if self.cosine_minutes is None else seconds / (60 * self.cosine_minutes)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(gone, 1)))


def start(device: str) -> Accelerator:
    """The processes of `accelerate launch` or `torchrun`, or this one alone, on `cuda` or `cpu`."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    return Accelerator(
        mixed_precision="bf16" if device.startswith("cuda") else "no",
        cpu=device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


class ModelWithLoss(nn.Module):
    """A model whose forward pass is its loss: what several processes need to share gradients."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch."""
        return self.loss(batch)


class Loop:
    """Trains `model`'s fp32 parameters on `loss`, a function of the batch that runs the model.

    Torch's random numbers are seeded with (seed, step) before every step, so that a resumed run draws what an
    unbroken one would. `loss` returns the same names each time, among them `loss`.
    """

    def __init__(
        self, folder: Path, model: nn.Module, loss: Loss, settings: Settings, accelerator: Accelerator
    ) -> None:
        from diffusers.training_utils import EMAModel  # not at the top: rendering workers import this module

        self.folder, self.settings, self.accelerator = Path(folder), settings, accelerator
        self._model_with_loss = accelerator.prepare(ModelWithLoss(model, loss))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if wrong := [name for name, p in self.trained.items() if p.dtype != torch.float32]:
            raise ValueError(f"parameters are trained in float32, these are not: {wrong[:5]}")
        self.optimizers = optimizers(self.trained, settings)
        self.ema = EMAModel(self.trained.values(), decay=settings.ema, foreach=True)
        self.step, self.seconds = 0, 0.0
        self._sums: dict[str, Tensor] = {}

    def run(self, batches: Batches, on_log: Callable[[int], None] | None = None) -> bool:
        """Train to the last step, the end of `minutes`, or a signal, and save; return whether all is done.

        Args:
            on_log: called with the step after every `log_every` steps and the last.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint stays.
        """
        began, before = time.perf_counter(), self.seconds
        since = (began, self.step)
        limit = math.inf if self.settings.minutes is None else self.settings.minutes * 60
        with stop_requests() as signals:
            while not self.is_done:
                is_late = time.perf_counter() - began >= limit
                if self._any_process(bool(signals) or is_late):
                    break
                rate = self.settings.rate(self.step, before + time.perf_counter() - began)
                self._training_step(batches, rate)
                if self.step % self.settings.log_every == 0 or self.is_done:
                    self.seconds = before + time.perf_counter() - began
                    self._log(rate, *since)
                    if on_log is not None:
                        on_log(self.step)
                    since = (time.perf_counter(), self.step)
        self.seconds = before + time.perf_counter() - began
        reason = signals[0] if signals else "all steps done" if self.is_done else "out of time"
        self.accelerator.print(f"stopped at step {self.step}: {reason}", flush=True)
        self.save()
        return self.is_done

    @property
    def is_done(self) -> bool:
        """Whether all steps are."""
        return self.step >= self.settings.steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for the `with` block."""
        parameters = list(self.trained.values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save(self) -> None:
        """Write the checkpoint, in the first process, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        state = {"step": self.step, "seconds": self.seconds, "settings": asdict(self.settings)}
        metadata = {"state": json.dumps(state)}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        write_whole(self.folder / CHECKPOINT, lambda path: save_file(plain, path, metadata))

    def resume(self) -> bool:
        """Load the folder's checkpoint, if there is one, and print the settings that differ.

        Raises:
            ValueError: the checkpoint is another model's.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
        self._load_tensors(load_file(path))
        old, new = state["settings"], json.loads(json.dumps(asdict(self.settings)))
        if changed := {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}:
            self.accelerator.print(f"settings that differ from the checkpoint's (old, new): {changed}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.ema.optimization_step = self.step
        self.accelerator.print(f"resumed at step {self.step} of {self.settings.steps}", flush=True)
        return True

    def _training_step(self, batches: Batches, rate: float) -> None:
        torch.manual_seed(
            (self.settings.seed + 7919 * self.accelerator.process_index) * 1_000_003 + self.step
        )
        values = self._model_with_loss(batches(self.step))
        self.accelerator.backward(values["loss"])
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (self.settings.muon if isinstance(optimizer, torch.optim.Muon) else 1)
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.trained.values())
        self.step += 1
        for name, value in {**values, "norm": norm}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def _any_process(self, stop: bool) -> bool:
        """Whether any process wants to stop; all of them get the same answer."""
        if self.accelerator.num_processes == 1:
            return stop
        if stop:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _log(self, rate: float, since: float, since_step: int) -> None:
        """Print and write the first process's means of the steps since the last log."""
        count = self.step - since_step
        row = {"step": self.step, **{name: float(total) / count for name, total in self._sums.items()}}
        self._sums = {}
        row |= {"lr": rate, "it/s": count / (time.perf_counter() - since), "seconds": self.seconds}
        if self.accelerator.device.type == "cuda":
            row["gpu"] = torch.cuda.memory_reserved() / 1e9  # GB
        if self.accelerator.is_main_process:
            scalars = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            print(f"step {self.step}/{self.settings.steps}  {scalars}", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} in the steps up to {self.step}")

    def _tensors(self) -> dict[str, Tensor]:
        """Trained weights, their average and the optimisers' states, by name."""
        tensors: dict[str, Tensor] = {}
        for (name, p), average in zip(self.trained.items(), self.ema.shadow_params, strict=True):
            tensors |= {f"weights/{name}": p, f"ema/{name}": average}
        for optimizer in self.optimizers:
            for index, state in optimizer.state_dict()["state"].items():
                kind = type(optimizer).__name__
                tensors |= {f"{kind}/{index}/{name}": value for name, value in state.items()}
        return tensors

    @torch.no_grad()
    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        names = {name.removeprefix("weights/") for name in tensors if name.startswith("weights/")}
        if names != self.trained.keys():
            raise ValueError(f"tensors of another model: {sorted(names ^ self.trained.keys())[:5]} …")
        for (name, p), average in zip(self.trained.items(), self.ema.shadow_params, strict=True):
            p.copy_(tensors[f"weights/{name}"])
            average.copy_(tensors[f"ema/{name}"])
        for optimizer in self.optimizers:
            states: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, value in tensors.items():
                if key.startswith(f"{type(optimizer).__name__}/"):
                    _, index, name = key.split("/")
                    states[int(index)][name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states)})


def optimizers(trained: dict[str, nn.Parameter], settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on matrices and kernels alone, and Muon for hidden matrices if it has a rate.

    Muon (Jordan et al. 2024) takes steps of AdamW's size (Liu et al. 2025).
    """
    hidden = [p for name, p in trained.items() if settings.muon and is_hidden(name, p)]
    rest = [p for p in trained.values() if not any(p is other for other in hidden)]
    matrices = [p for p in rest if p.squeeze().ndim >= 2]  # (C, 1, 1, 1) is a norm's scale in the VAE
    vectors = [p for p in rest if p.squeeze().ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    decay = settings.weight_decay
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=settings.betas, weight_decay=decay, fused=rest[0].is_cuda)
    ]
    if hidden:
        found.append(torch.optim.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix between hidden states."""
    return parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


def plot_log(folder: Path) -> Path:
    """Draw every scalar of the log over the steps into loss.png.

    Raises:
        FileNotFoundError: the folder has no log.
    """
    from matplotlib.figure import Figure

    from qwen_vision_bridge.plots import to_image

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
    return write_image(Path(folder) / "loss.png", to_image(figure), {"log": str(Path(folder) / LOG)})


if __name__ == "__main__":
    print(plot_log(Path(sys.argv[1])))
