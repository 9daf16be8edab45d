"""What the bridge of a control sees in place of the source's levels, in training as in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from .bridge import BridgeConfig
from .cache import VisionCache
from .injection import Grids, Levels
from .io import digest_of

Features = Literal["own", "shuffled", "target"]
"""The image's own source features; those of another image on the same grid; or the target's own features in
place of every level, see `target_levels`."""


def target_levels(config: BridgeConfig) -> Levels:
    """Levels for a target-only control: the target tower's own output in place of every level.

    A bridge as wide as the target takes it as it is. Others get it through a fixed, seeded, semi-orthogonal
    matrix, which keeps lengths and angles as far as the widths allow and adds no knowledge, so any checkpoint
    can run without its source and a control of the same size can be trained on the same footing.
    """

    def levels(features: torch.Tensor, grids: Grids) -> VisionCache:
        seen = features
        if config.source_dim != features.shape[-1]:
            matrix = _projection(features.shape[-1], config.source_dim).to(features.device)
            seen = (features.float() @ matrix).to(features.dtype)  # (N, source_dim)
        return VisionCache(dict.fromkeys(config.levels, seen[None]), grids)

    return levels


def find_partners(grids: Mapping[str, Grids], seed: int) -> dict[str, str | None]:
    """For each case another one with the same grids, whose source features a shuffled control sees.

    A derangement: within each set of equal grids, one cycle in an order that seed and case ids alone decide,
    so the order in which cases come does not matter and no case is taken twice.

    Returns:
        None for a case whose grids no other has.
    """
    by_grid: dict[Grids, list[str]] = {}
    for case_id in sorted(grids, key=lambda case_id: digest_of([seed, case_id])):
        by_grid.setdefault(grids[case_id], []).append(case_id)
    partners: dict[str, str | None] = {}
    for members in by_grid.values():
        for one, other in zip(members, [*members[1:], members[0]], strict=True):
            partners[one] = other if other != one else None
    return partners


@lru_cache(maxsize=4)
def _projection(inputs: int, outputs: int) -> torch.Tensor:
    """A seeded (inputs, outputs) matrix with orthonormal rows or columns, whichever are fewer."""
    noise = np.random.default_rng(0).normal(size=(max(inputs, outputs), min(inputs, outputs)))
    orthonormal, _ = np.linalg.qr(noise)
    matrix = orthonormal if inputs >= outputs else orthonormal.T
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))
