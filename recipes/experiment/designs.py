"""The arms of the experiment, and the designs that validation chooses among, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Design:
    """One way to a bridge. Everything that is not said is the library's default."""

    name: str
    method: str = "perceive"
    """`fresh`, `random`, `calibrate`, `perceive`, `edit` or `perceive+edit`."""
    features: str = "own"
    rival: bool = False
    start: str | None = None
    """`calibrate`: training continues from the calibrated bridge."""
    teacher: bool = False
    """Calibrate to what the target sees of sharp pictures."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes of `BridgeConfig`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Changes of `TrainingSettings`."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of weights that do not learn."""
    zeroed: tuple[str, ...] = ()
    """Beginnings of the names of weights that are set to zero first."""
    samples: int | None = None
    """Fewer lessons than the run's."""

    @property
    def is_trained(self) -> bool:
        """Whether it depends on a training seed."""
        return self.method in ("perceive", "edit", "perceive+edit")


NO_QUERY = ("query", "keys")
ARMS = (
    Design("fresh", "fresh"),
    Design("random", "random"),
    Design("calibrated", "calibrate"),
    Design("perceive"),
    Design("edit", "edit"),
    Design("perceive+edit", "perceive+edit"),
    Design("shuffled", features="shuffled"),
    Design("target-only", features="target"),
    Design("lora", rival=True),
)
"""The arms of the final test, beside the baseline, which needs no bridge."""

DESIGNS = (
    Design("perceive"),
    Design("late-alone", config={"levels": ("late",)}),
    Design("early-alone", config={"levels": ("early",)}),
    Design("no-query", frozen=NO_QUERY, zeroed=NO_QUERY),
    Design("anchored", settings={"anchor": 0.1}),
    Design("statistics", settings={"match_statistics": 0.01}),
    Design("replace", config={"blend": "replace"}),
    Design("from-calibrated", start="calibrate"),
    Design("taught", "calibrate", teacher=True),
    Design("taught-shuffled", "calibrate", "shuffled", teacher=True),
    Design("taught-target-only", "calibrate", "target", teacher=True),
    Design("from-taught", start="calibrate", teacher=True),
    Design("norms-and-gate-alone", start="calibrate", frozen=("query", "keys", "ups", "downs")),
    Design("random-start", config={"init": "random"}, settings={"learning_rate": 1e-3}),
    Design("hard-first", settings={"hard_share": 0.5}),
    Design("average-kept", settings={"use_ema": True}),
)
"""What validation chooses among; the first is the library's default."""

RANKS = tuple(
    Design(f"rank-{rank}", config={"rank": rank, "query_dim": rank}) for rank in (4, 12, 24, 48, 96)
)
AMOUNTS = tuple(Design(f"{count}-lessons", samples=count) for count in (250, 1000, 4000))
EXTRA = {design.name: design for design in (*ARMS, *DESIGNS, *RANKS, *AMOUNTS)}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
