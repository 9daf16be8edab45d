"""Time and peak memory of whole calls, of alternatives in turn, and of the stages inside an edit.

On CUDA the times of stages come from events on the device, on a CPU from the process's clock; peak memory is
that of torch's allocator on CUDA, and unknown (nan) on a CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from qwen_vision_bridge.extractor import VisionCacheExtractor

T = TypeVar("T")
Moment = float | torch.cuda.Event


class Measured(NamedTuple):
    """Repeated measurements in three numbers."""

    median: float
    spread: float
    """Interquartile range; 0 for a single value."""
    n: int


def summarise(values: Sequence[float]) -> Measured:
    """Median, interquartile range and count.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("nothing was measured")
    if len(values) == 1:
        return Measured(float(values[0]), 0.0, 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(statistics.median(values), high - low, len(values))


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Result of a call and its seconds, from an idle device to an idle device."""
    synchronise(device)
    started = time.perf_counter()
    result = call()
    synchronise(device)
    return result, time.perf_counter() - started


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    enough: Callable[[float], bool] = lambda _: False,
) -> dict[str, list[float]]:
    """Measure calls in turn (a b a b …), so that a drift of the machine affects all alike.

    Args:
        warmup: unmeasured rounds before.
        enough: called after every round with its seconds; True ends the measurement.

    Returns:
        Seconds of each call, by round.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call, device)[1])
        if enough(sum(values[-1] for values in seconds.values())):
            break
    return seconds


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Measure the allocator's peak inside the `with`: at its end the list holds it, in bytes."""
    peak: list[float] = []
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else math.nan)


class Stages:
    """Times and peaks of the stages of a pipeline's calls inside the `with`.

    Enter it before the bridge's hooks: the target tower's time then ends where the bridge's begins.
    """

    def __init__(
        self, pipe: DiffusionPipeline, bridge: nn.Module | None, extractor: VisionCacheExtractor | None = None
    ) -> None:
        self.device = torch.device(pipe._execution_device)
        encoder = pipe.text_encoder.model
        self.modules = {
            "target tower": encoder.visual,
            "language model": encoder.language_model,
            "DiT step": pipe.transformer,
        }
        self.methods: dict[str, tuple[object, str]] = {
            "VAE encode": (pipe.vae, "encode"),
            "VAE decode": (pipe.vae, "decode"),
        }
        if bridge is not None:
            self.methods["bridge"] = (bridge, "contributions")
        if extractor is not None:
            self.methods["source tower"] = (extractor, "_run_source")
        self.peaks: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._open: dict[str, Moment] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Stages:
        for name, module in self.modules.items():
            begin = module.register_forward_pre_hook(lambda *_, stage=name: self._begin(stage))
            end = module.register_forward_hook(lambda *_, stage=name: self._end(stage))
            self._stack.callback(begin.remove)
            self._stack.callback(end.remove)
        for name, (owner, method) in self.methods.items():
            setattr(owner, method, self._wrapped(name, getattr(owner, method)))
            self._stack.callback(delattr, owner, method)  # the class's own is seen again
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def seconds(self) -> dict[str, list[float]]:
        """Every measured span by stage."""
        synchronise(self.device)
        seconds: dict[str, list[float]] = defaultdict(list)
        for name, begin, end in self._spans:
            is_event = isinstance(begin, torch.cuda.Event)
            seconds[name].append(begin.elapsed_time(end) / 1e3 if is_event else end - begin)
        return dict(seconds)

    def _wrapped(self, name: str, method: Callable[..., T]) -> Callable[..., T]:
        def measured(*args: Any, **kwargs: Any) -> T:
            self._begin(name)
            result = method(*args, **kwargs)
            self._end(name)
            return result

        return measured

    def _begin(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._open[name] = self._now()

    def _end(self, name: str) -> None:
        self._spans.append((name, self._open.pop(name), self._now()))
        if self.device.type == "cuda":
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated(self.device))

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
