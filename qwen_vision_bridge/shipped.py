"""Which bridge a user means: the family's shipped one, a fresh or random one, a folder, a hub id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .bridge import BridgeConfig, VisionBridge
from .specs import Family

logger = logging.getLogger(__name__)

SHIPPED_BRIDGES = {"miniature": Path(__file__).parent / "weights" / "bridge-miniature"}


def resolve_bridge(given: Any, family: Family) -> tuple[VisionBridge, str]:
    """A bridge and its name from what a user may give; see `EnhancedQwenImageEdit`.

    Raises:
        ValueError: a bridge made for other models; both sides are named.
        FileNotFoundError, OSError, ValueError: what loading it raises.
    """
    shipped = SHIPPED_BRIDGES.get(family.name)
    if given is None and shipped is not None and shipped.is_dir():
        bridge, name = VisionBridge.from_pretrained(shipped), f"{shipped.name}, as shipped"
    elif isinstance(given, VisionBridge):
        bridge, name = given, "given"
    elif given in (None, "fresh", "random"):
        if given is None:
            logger.warning(
                "no trained bridge for %s: a fresh one is used, which changes nothing", family.name
            )
        init = "random" if given == "random" else "zero"
        bridge, name = VisionBridge(BridgeConfig.for_family(family, init=init)), given or "fresh"
    else:
        bridge, name = VisionBridge.from_pretrained(str(given)), str(given)
    _check_bridge(bridge.config, name, family)
    return bridge.eval().requires_grad_(False), name


def _check_bridge(config: BridgeConfig, name: str, family: Family) -> None:
    made_from = f"{config.source_model or 'any source'} ({config.source_dim})"
    made_for = f"{config.target_model or 'any target'} ({config.target_dim})"
    beside = (
        f"{family.source.name} ({family.source.out_dim}) and {family.target.name} ({family.target.out_dim})"
    )
    fits = (
        config.source_dim == family.source.out_dim
        and config.target_dim == family.target.out_dim
        and config.source_model in (None, family.source.name)
        and config.target_model in (None, family.target.name)
    )
    if not fits:
        raise ValueError(
            f"the bridge {name!r} was made from {made_from} to {made_for}; it cannot stand between {beside}"
        )
