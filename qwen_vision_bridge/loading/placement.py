"""Memory plans: which part of the released models lies where in a mode, said before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..specs import Family
from .editors import MEMORY_MODES, PREFERENCE, WORKING_GB, MemoryMode
from .memory import usable_gpu_bytes

logger = logging.getLogger(__name__)

TOWER_GB = 1.2  # the source's tower in 16 bits
CARDS_GB = (80, 48, 24, 16, 12)
PLACES = {
    None: "on the GPU",
    "model": "in CPU memory, on the GPU while it works",
    "group": "in CPU memory, layer by layer on the GPU, the next one on its way",
    "sequential": "in CPU memory, layer by layer on the GPU",
}


@dataclass(frozen=True)
class MemoryPlan:
    """One mode for one family on one card. All sizes are estimates in 10⁹ bytes; see `editors`."""

    mode: MemoryMode
    family: Family
    card_gb: float
    """Memory of the GPU that may be used."""

    @property
    def need_gb(self) -> float:
        """Estimated peak on the GPU, the source's tower not counted."""
        return self.mode.gpu_gb(self.family.editor)

    @property
    def keeps_source(self) -> bool:
        """Whether the source's tower may stay on the GPU while the transformer works."""
        return self.mode.offload is None and self.need_gb + TOWER_GB <= self.card_gb

    def lines(self) -> list[str]:
        """The plan in words, one part a line."""
        transformer, encoder = self.mode.part_sizes(self.family.editor)
        bits = f"{self.mode.bits}-bit" if self.mode.bits else "bf16"
        place = PLACES[self.mode.offload]
        tower = "kept on the GPU" if self.keeps_source else "on the GPU before the edit, then freed"
        head = f"Memory plan for {self.card_gb:.0f} GB: {self.mode.name} ({self.mode.arguments})"
        return [
            f"{head}, about {self.need_gb:.0f} GB at the peak (estimates)",
            f"  source tower   {TOWER_GB:5.1f} GB, bf16, {tower}",
            f"  text encoder   {encoder:5.1f} GB, {bits} (its tower bf16), {place}",
            f"  transformer    {transformer:5.1f} GB, {bits}, {place}",
            f"  working space  {WORKING_GB:5.1f} GB",
        ]


def plan_for(family: Family, card_gb: float, ram_gb: float) -> MemoryPlan | None:
    """The plan of the preferred mode that fits a card and the CPU's memory, or None."""
    mode = best_mode(family, card_gb, ram_gb)
    return None if mode is None else MemoryPlan(mode, family, card_gb)


def best_mode(family: Family, gpu_gb: float, ram_gb: float) -> MemoryMode | None:
    """The first mode of `PREFERENCE` that fits, or None; what waits in CPU memory has to fit there too."""
    modes = {mode.name: mode for mode in MEMORY_MODES}
    for name in PREFERENCE:
        mode = modes[name]
        if mode.gpu_gb(family.editor) <= gpu_gb and (
            not mode.offload or mode.weights_gb(family.editor) <= ram_gb
        ):
            return mode
    return None


def say(plan: MemoryPlan) -> None:
    """Log a plan, unless the models are too small to plan for."""
    if plan.family.editor.transformer_params:
        for line in plan.lines():
            logger.info(line)


def card_gb(device: torch.device) -> float:
    """Memory of a GPU that this process may use, 10⁹ bytes; 0 for a CPU."""
    return usable_gpu_bytes(device)[1] / 1e9 if device.type == "cuda" else 0.0
