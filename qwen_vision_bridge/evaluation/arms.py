"""What an arm of an evaluation is: the baseline, a bridge at some strength and site, or a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..bridge import BridgeConfig, VisionBridge, bridge_digest, check_strength, resolve_bridge
from ..cache import VisionCache
from ..injection import SITES, Grids, Levels, Site
from ..io import digest_of
from ..specs import Family
from .statistics import BASELINE

Features = Literal["own", "shuffled", "target"]
FORM = "NAME=BRIDGE[,strength=S][,site=SITE][,features=own|shuffled|target]"


@dataclass(frozen=True)
class Arm:
    """One way to run every case."""

    name: str
    bridge: VisionBridge | None = None
    """None is the baseline."""
    bridge_name: str = ""
    strength: float = 1.0
    site: Site = "tower"
    features: Features = "own"
    """What the bridge sees: the case's own source features; those of another case on the same grid
    (`shuffled`); or the target's own features in place of every level (`target`, see `target_levels`)."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"an arm's name is letters, digits, '-', '_' and '.', not {self.name!r}")
        if self.site not in SITES:
            raise ValueError(f"site is one of {', '.join(SITES)}, not {self.site!r}")
        if self.features not in get_args(Features):
            raise ValueError(f"features is one of {', '.join(get_args(Features))}, not {self.features!r}")

    @property
    def is_control(self) -> bool:
        """Whether no gain is expected of it: it does not see the case's own source features."""
        return self.bridge is None or self.features != "own"

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the arm that decides an image, but the features themselves."""
        if self.bridge is None:
            return {}
        return {
            "bridge": bridge_digest(self.bridge),
            "strength": self.strength,
            "site": self.site,
            "features": self.features,
        }

    def describe(self) -> dict[str, Any]:
        """The arm as plain data for a results file."""
        return {"name": self.name, "bridge_name": self.bridge_name, **self.fingerprint()}


def default_arms(bridge: VisionBridge, name: str, strength: float = 1.0, site: Site = "tower") -> list[Arm]:
    """The arms that every claim needs: baseline, bridge, and its two controls."""
    kinds: tuple[tuple[str, Features], ...] = (
        ("bridge", "own"),
        ("shuffled", "shuffled"),
        ("target-only", "target"),
    )
    return [Arm(BASELINE), *(Arm(label, bridge, name, strength, site, features) for label, features in kinds)]


def parse_arm(text: str, family: Family) -> Arm:
    """An arm as a command line gives it, `FORM`; the bridge is a folder, hub id, `fresh` or `random`.

    A bridge for `features=target` may be as wide as the target, whatever the source.

    Raises:
        ValueError, FileNotFoundError, OSError: what is wrong with it.
    """
    name, given, rest = text.partition("=")
    bridge, *options = rest.split(",")
    settings = dict(option.partition("=")[::2] for option in options)
    if not given or not bridge or set(settings) - {"strength", "site", "features"}:
        raise ValueError(f"an arm is {FORM}, not {text!r}")
    try:
        strength = float(settings.get("strength", 1.0))
    except ValueError as error:
        raise ValueError(f"strength is a number such as 1.0, not {settings['strength']!r}") from error
    if settings.get("features") == "target" and bridge not in ("fresh", "random"):
        loaded = VisionBridge.from_pretrained(bridge).requires_grad_(False)
        if loaded.config.target_dim != family.target.out_dim:
            raise ValueError(
                f"the bridge {bridge!r} makes features of width {loaded.config.target_dim}, "
                f"{family.target.name} has {family.target.out_dim}"
            )
    else:
        loaded, _ = resolve_bridge(bridge, family)
    return Arm(name, loaded, bridge, strength, settings.get("site", "tower"), settings.get("features", "own"))


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuse arms that cannot be compared.

    Raises:
        ValueError: no baseline, or two arms of one name.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"every arm has a name of its own, got {', '.join(names)}")
    if [arm.name for arm in arms if arm.bridge is None] != [BASELINE]:
        raise ValueError(f"one arm is the baseline and named {BASELINE!r}; got {', '.join(names)}")


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
    so the order in which cases come does not matter and no case is given twice.

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
