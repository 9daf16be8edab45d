"""Benchmark of calibration: seconds and memory of fitting a bridge in closed form.

The tokens are noise of low rank in bf16, in a pool that is streamed as often as needed: speed and memory
depend on shapes, not on values.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

import torch

from qwen_vision_bridge.bridge import BridgeConfig
from qwen_vision_bridge.training.calibration import Tokens, calibrate

from .runner import Bench
from .timing import timed

CHUNK = 4096  # tokens
POOL = 8  # distinct chunks
NOISE_RANK = 256
TOKENS = {True: 1_000_000, False: POOL * CHUNK}  # by whether the shapes are the released ones


def calibration(bench: Bench) -> None:
    """Calibrate on the CPU; the process's peak memory includes the pool."""
    config, tokens = BridgeConfig.for_family(bench.load_family()), TOKENS[bench.released]
    pool = _pool(config)
    before = _peak_bytes()

    def stream() -> Iterator[Tokens]:
        for number in range(-(-tokens // CHUNK)):
            yield pool[number % POOL]

    _, seconds = timed(lambda: calibrate(config, stream), torch.device("cpu"))
    name = f"calibration on {tokens} tokens, {torch.get_num_threads()} CPU threads"
    bench.add(name, seconds, "s")
    bench.add(f"{name}: peak memory of the process", _peak_bytes(), "GB", scale=1e-9)
    bench.add(f"{name}: peak memory before, with the pool", before, "GB", scale=1e-9)


def _pool(config: BridgeConfig) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    widths = [config.source_dim] * len(config.levels) + [config.target_dim]
    maps = [torch.randn(NOISE_RANK, width, generator=generator) for width in widths]
    pool = []
    for _ in range(POOL):
        hidden = torch.randn(CHUNK, NOISE_RANK, generator=generator)
        noise = [torch.randn(CHUNK, width, generator=generator) for width in widths]
        *levels, baseline = ((hidden @ a + 4 * b).bfloat16() for a, b in zip(maps, noise, strict=True))
        pool.append(Tokens(levels, baseline))
    return pool


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts kB
