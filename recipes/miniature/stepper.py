"""One optimiser step of a small model: eager on the CPU, a CUDA graph per layout of the batch on CUDA."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them
WARM_RUNS = 3  # steps before a capture: they create the optimiser's state and choose the kernels

Loss = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Compilable(Protocol):
    """A model whose repeated blocks torch.compile can compile, with one result for each kind."""

    def compile_blocks(self, on: bool) -> None: ...


@dataclass
class Layout:
    """One layout of a batch (names, shapes, dtypes) with its static inputs, graph and sums for the log."""

    inputs: dict[str, Tensor]
    names: list[str] = field(default_factory=list)
    sums: Tensor | None = None  # (names + 1,): of every scalar, and how many steps they sum
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


def precision(device: torch.device) -> torch.autocast:
    """The autocast context of losses: bf16 on CUDA, fp32 on the CPU."""
    # the cache of cast weights would outlive a capture
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class Stepper:
    """Forward, backward, clipping, AdamW, Muon and the weights' average, without one synchronisation.

    Muon trains the parameters `hidden`, at `boost` times the rate, and AdamW the others. `loss` returns the
    same names each time; its random numbers come from the device's default generator, the one that graphs
    know. A parameter that a batch does not use has a gradient of zeros, not None.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        loss: Loss,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        graphs: bool,
        hidden: Sequence[nn.Parameter] = (),
        boost: float = 1.0,
    ) -> None:
        self.device, self._loss, self._clip = parameters[0].device, loss, clip
        self.is_cuda = self.device.type == "cuda"
        self.parameters, self.graphs = parameters, graphs and self.is_cuda
        self.layouts: dict[tuple, Layout] = {}
        self.rate = torch.zeros((), device=self.device)
        self._boosted = torch.zeros((), device=self.device)
        self._boost = boost
        self._pull = torch.zeros((), device=self.device)  # 1 − the average's decay
        self.average = [p.detach().clone() for p in parameters]
        for p in parameters:  # graphs write to where gradients were at capture: these are never replaced
            p.grad = torch.zeros_like(p)
        self._gradients = [p.grad for p in parameters]
        self.muon = Muon(list(hidden), self._boosted, weight_decay)
        self._momentum = dict(zip(self.muon.parameters, self.muon.moments, strict=True))
        rest = [p for p in parameters if p not in set(hidden)]
        self.optimizer = _adamw(rest, self.rate, betas, weight_decay)
        self._stream = torch.cuda.Stream(self.device) if self.graphs else None
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None

    def advance(self, batch: dict[str, Tensor], rate: float, decay: float) -> None:
        """One step at a learning rate, with a decay of the average."""
        layout = self._layout(batch)
        self.rate.fill_(rate)
        self._boosted.fill_(rate * self._boost)
        self._pull.fill_(1 - decay)
        if self.graphs and layout.graph is None and layout.runs >= WARM_RUNS:
            self._capture(layout)
        if layout.graph is not None:
            layout.graph.replay()
        elif self.graphs:  # where the capture will be, as it asks for
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(layout)
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            self._step(layout)
        layout.runs += 1

    @property
    def updates(self) -> float:
        """Number of updates over all runs."""
        return max((float(state["step"]) for state in self.optimizer.state.values()), default=0.0)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimiser's moments of a parameter by name; none before the first step."""
        if parameter in self._momentum:
            return {"momentum": self._momentum[parameter]}
        state = self.optimizer.state.get(parameter, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor], updates: float) -> None:
        """Set what `moments` returned after so many updates.

        Raises:
            ValueError: the names of another optimiser.
        """
        if parameter in self._momentum:
            copy_tensors(moments, {"momentum": self._momentum[parameter]})
            return
        state = {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}
        copy_tensors(moments, state)
        # AdamW counts on the device where it is fused, else on the host
        count = torch.tensor(updates, dtype=torch.float32, device=self.device if self.is_cuda else "cpu")
        self.optimizer.state[parameter] = {"step": count, **state}

    def take_means(self) -> dict[str, float]:
        """Mean of every scalar, and of the gradients' `norm`, over the steps since the last call."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for layout in self.layouts.values():
            *values, count = layout.sums.tolist()
            layout.sums.zero_()
            for name, value in zip(layout.names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
        return {name: sums[name] / counts[name] for name in sums if counts[name]}

    def _layout(self, batch: dict[str, Tensor]) -> Layout:
        key = tuple((name, tuple(batch[name].shape), batch[name].dtype) for name in sorted(batch))
        if key not in self.layouts:
            self.layouts[key] = Layout({name: tensor.clone() for name, tensor in batch.items()})
        layout = self.layouts[key]
        for name, tensor in batch.items():
            layout.inputs[name].copy_(tensor, non_blocking=True)
        return layout

    def _capture(self, layout: Layout) -> None:
        graph = torch.cuda.CUDAGraph()
        shapes = {name: tuple(tensor.shape) for name, tensor in layout.inputs.items()}
        try:
            # thread_local: NCCL's own thread may ask for its events meanwhile
            how = {"pool": self._memory, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **how):
                self._step(layout)
        except RuntimeError as error:
            traceback.print_exc()
            print(f"\n!!! NO CUDA GRAPH for {shapes}, going on eagerly and slowly: {error}\n", flush=True)
            self.graphs = False
            return
        layout.graph = graph
        print(f"captured a CUDA graph for {shapes}", flush=True)

    def _step(self, layout: Layout) -> None:
        """The body of a graph; nothing created here is read outside."""
        torch._foreach_zero_(self._gradients)
        with precision(self.device):
            values = self._loss(layout.inputs)
        values["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self.optimizer.step()
        self.muon.step()
        with torch.no_grad():
            # neither _foreach_lerp_ nor AveragedModel: their weight is a number, which a graph would freeze
            pulls = torch._foreach_sub(self.parameters, self.average)
            torch._foreach_mul_(pulls, self._pull)
            torch._foreach_add_(self.average, pulls)
            scalars = [*(value.detach().float() for value in values.values()), norm, torch.ones_like(norm)]
            if layout.sums is None:
                layout.names = [*values, "norm"]
                layout.sums = torch.zeros(len(scalars), device=self.device)
            layout.sums.add_(torch.stack(scalars))


def _adamw(
    parameters: list[nn.Parameter], rate: Tensor, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels alone."""
    vectors = [p for p in parameters if p.squeeze().ndim < 2]  # (C, 1, 1, 1) is a norm's scale in the VAE
    matrices = [p for p in parameters if p.squeeze().ndim >= 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=rate.is_cuda, capturable=rate.is_cuda)
    for group in optimizer.param_groups:  # the very tensor, which steps fill and graphs read
        group["lr"] = rate
    return optimizer


def compiles(compute: Loss, batches: list[dict[str, Tensor]], parameters: list[nn.Parameter]) -> bool:
    """Whether a compiled loss runs, forward and backward; print the error if not."""
    started = time.perf_counter()
    try:
        for batch in batches:
            with precision(parameters[0].device):
                value = compute(batch)["loss"]
            value.backward()
    except Exception as error:  # compilers raise anything
        traceback.print_exc()
        print(f"\n!!! torch.compile FAILED, going on without, slower: {error}\n", flush=True)
        return False
    finally:
        for p in parameters:
            p.grad = None
    print(f"torch.compile took {time.perf_counter() - started:.0f} s, loss {value.item():.4f}", flush=True)
    return True


def compile_if_possible(
    model: Compilable, compute: Loss, batches: list[dict[str, Tensor]], parameters: list[nn.Parameter]
) -> None:
    """Compile a model's blocks if the loss then runs."""
    model.compile_blocks(True)
    if not compiles(compute, batches, parameters):
        model.compile_blocks(False)


def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names, which may differ in dtype and device.

    Raises:
        ValueError: the names differ.
    """
    if source.keys() != target.keys():
        raise ValueError(f"tensors of another model: {sorted(source.keys() ^ target.keys())[:5]} …")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
