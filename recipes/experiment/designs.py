"""The arms of the experiment, and the designs that validation chooses among, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Design:
    """One way to a bridge. Everything that is not said is the library's default."""

    name: str
    method: str = "perceive"
    """`fresh`, `random`, `calibrate`, `perceive`, `edit` or `perceive+edit`; `sharp` is no bridge but the
    target's own tower, shown images that the pipeline does not reduce: what better vision alone are worth."""
    features: str = "own"
    rival: bool = False
    start: str | None = None
    """The design whose finished bridge training goes on from; None is a new bridge."""
    teacher: bool = True
    """Calibrate to what the target sees of sharp images; else to its own features."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes of `BridgeConfig`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Changes of `TrainingSettings`."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of weights that do not learn."""
    zeroed: tuple[str, ...] = ()
    """Beginnings of the names of weights that are set to zero first."""
    samples: int | None = None
    """Fewer samples than the run's."""
    share: float = 1.0
    """Of the run's steps: those through the transformer cost several times as much."""

    @property
    def is_trained(self) -> bool:
        """Whether it depends on a training seed."""
        return self.method in ("perceive", "edit", "perceive+edit")

    @property
    def is_bridge(self) -> bool:
        """Whether a bridge comes of it."""
        return not self.rival and self.method != "sharp"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of samples that it learns from."""
        if self.method == "calibrate":
            return ("perceive",)
        return tuple(self.method.split("+")) if self.is_trained else ()

    def seeds(self, given: Sequence[int]) -> list[int]:
        """Those of the given training seeds that it is trained with: 0 where none changes it."""
        return list(given) if self.is_trained else [0]

    def place(self, folder: Path, seed: int) -> Path:
        """Where it is at a seed."""
        return folder / "runs" / f"{self.name}-seed{seed if self.is_trained else 0}"

    def is_finished(self, folder: Path, seed: int) -> bool:
        """Whether it is there, whole."""
        return (self.place(folder, seed) / "done.json").is_file()


NO_QUERY = ("query", "keys")
THROUGH = 1 / 5  # of the steps for what learns through the transformer
STARTS = (
    Design("calibrated", "calibrate"),
    Design("calibrated-shuffled", "calibrate", "shuffled"),
    Design("calibrated-target-only", "calibrate", "target"),
)
"""The closed form, and the same of both controls."""

ARMS = (
    Design("fresh", "fresh"),
    Design("random", "random"),
    STARTS[0],
    Design("perceive", start="calibrated"),
    Design("edit", "edit", start="calibrated", share=THROUGH),
    Design("perceive+edit", "perceive+edit", start="perceive", share=THROUGH),
    Design("shuffled", features="shuffled", start="calibrated-shuffled"),
    Design("target-only", features="target", start="calibrated-target-only"),
    Design("lora", rival=True),
    Design("sharp", "sharp"),
)
"""The arms of the final test, beside the baseline, which needs no bridge."""

DESIGNS = (
    *STARTS,
    Design("calibrated-to-itself", "calibrate", teacher=False),
    Design("perceive", start="calibrated"),
    Design("fresh-start", start=None),
    Design("random-start", config={"init": "random"}, settings={"learning_rate": 1e-3}),
    Design("replace", config={"blend": "replace"}),
    Design("early-alone", config={"levels": ("early",)}),
    Design("late-alone", config={"levels": ("late",)}),
    Design("no-query", start="calibrated", frozen=NO_QUERY, zeroed=NO_QUERY),
    Design("gate-and-norms-alone", start="calibrated", frozen=("query", "keys", "ups", "downs")),
    Design("average-kept", start="calibrated", settings={"use_ema": True}),
    Design("slower", start="calibrated", settings={"learning_rate": 1e-3}),
    Design("faster", start="calibrated", settings={"learning_rate": 5e-3}),
    Design("edit", "edit", start="calibrated", share=THROUGH),
    Design("perceive+edit", "perceive+edit", start="perceive", share=THROUGH),
    Design("edit-heavy", "perceive+edit", start="perceive", share=THROUGH, settings={"edit_weight": 40.0}),
    Design(
        "no-dropout", "perceive+edit", start="perceive", share=THROUGH, settings={"condition_dropout": 0.0}
    ),
)
"""What validation chooses among."""

_RANKS = {f"rank-{rank}": {"rank": rank, "query_dim": rank} for rank in (4, 12, 24, 48, 96)}
_AMOUNTS = {f"{count}-samples": count for count in (250, 1000, 4000, 16_000)}
CURVE_STARTS = (
    *(Design(f"calibrated-{name}", "calibrate", config=config) for name, config in _RANKS.items()),
    *(Design(f"calibrated-{name}", "calibrate", samples=count) for name, count in _AMOUNTS.items()),
)
RANKS = tuple(Design(name, start=f"calibrated-{name}", config=config) for name, config in _RANKS.items())
AMOUNTS = tuple(Design(name, start=f"calibrated-{name}", samples=count) for name, count in _AMOUNTS.items())
EXTRA = {design.name: design for design in (*ARMS, *DESIGNS, *CURVE_STARTS, *RANKS, *AMOUNTS)}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def with_starts(designs: Iterable[Design]) -> list[Design]:
    """The designs and all that they start from, each behind its start."""
    found: dict[str, Design] = {}

    def put(design: Design) -> None:
        if design.start is not None:
            put(EXTRA[design.start])
        found.setdefault(design.name, design)

    for design in designs:
        put(design)
    return list(found.values())
