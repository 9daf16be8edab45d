"""How long and in how much memory a bridge of the released shapes is calibrated.

    python recipes/calibration_speed.py --tokens 1000000

The tokens are noise of low rank in bf16, in a pool that is streamed as often as it takes: speed and memory
depend on shapes, not on values.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from qwen_vision_bridge.bridge import BridgeConfig
from qwen_vision_bridge.training.calibration import Tokens, calibrate

CHUNK = 4096


def main() -> None:
    """Calibrate and print seconds and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--pool", type=int, default=32_768, help="distinct tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--teacher", action="store_true", help="with a teacher beside the target")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = BridgeConfig()
    pool = _pool(config, arguments.pool, arguments.teacher)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stream() -> Iterator[Tokens]:
        for number in range(-(-arguments.tokens // CHUNK)):
            yield pool[number % len(pool)]

    started = time.perf_counter()
    found = calibrate(config, stream)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{found.tokens} tokens in {seconds:.0f} s, {arguments.threads} threads")
    print(f"peak memory {peak / 1e6:.1f} GB, {before / 1e6:.1f} GB of it before, the pool included")
    print(f"explained {found.explained:.3f}, rank {found.rank}, ridge {found.ridge}, kept {found.kept}")


def _pool(config: BridgeConfig, count: int, teacher: bool) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    chunks = []
    maps = [torch.randn(256, config.source_dim, generator=generator) for _ in config.levels]
    wide = torch.randn(256, config.target_dim, generator=generator)
    for _ in range(count // CHUNK):
        hidden = torch.randn(CHUNK, 256, generator=generator)
        levels = [
            (hidden @ one + 4 * torch.randn(CHUNK, config.source_dim, generator=generator)).bfloat16()
            for one in maps
        ]
        baseline = (hidden @ wide + 4 * torch.randn(CHUNK, config.target_dim, generator=generator)).bfloat16()
        chunks.append(Tokens(levels, baseline, 1.1 * baseline if teacher else None))
    return chunks


if __name__ == "__main__":
    main()
