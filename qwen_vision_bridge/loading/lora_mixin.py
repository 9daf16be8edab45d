"""`load_lora`, `set_lora` and `unload_lora` of a class around a stock pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .editors import few_step_scheduler
from .lora_files import check_weight, find_lora, lora_revision
from .loras import LoraSet

FEW_STEPS = "few-steps"  # name of the LoRA that `fast` loads


class LoraMixin:
    """LoRAs for a class whose stock diffusers pipeline is in `.pipe`."""

    pipe: Any
    _lora_set: LoraSet | None = None

    @property
    def lora_set(self) -> LoraSet:
        """The LoRAs of the pipeline that is loaded."""
        if self._lora_set is None or self._lora_set.pipe is not self.pipe:
            self._lora_set = LoraSet(self.pipe)
        return self._lora_set

    @property
    def loras(self) -> dict[str, float]:
        """The weight of every LoRA by name, those put on `.pipe` by hand included."""
        return self.lora_set.weights()

    def load_lora(self, file: str | Path, weight: float = 1.0, name: str | None = None, **rare: Any) -> str:
        """Load a LoRA for baseline and enhanced edits alike; it acts as trained, or this raises.

        Args:
            file: a safetensors file of any trainer, a folder, or a hub id (`owner/name`, with a file in it
                `owner/name/file.safetensors`).
            weight: scales its update; may be negative.
            name: by which `set_lora` and `unload_lora` know it; None takes the file's.
            rare: `weight_name`, the file in a folder or repository that has several; `vision_tower=True`
                accepts changes of the tower that the bridge was trained beside.

        Returns:
            The name.

        Raises:
            ValueError: keys that match no layer, an unknown kind, zero matrices, no effect, a name in use.
            FileNotFoundError, OSError: no such file, no connection.
        """
        weight = check_weight(weight)
        find_lora(file, rare.get("weight_name"))  # before the pipeline is loaded
        return self.lora_set.load(file, weight, name, **rare)

    def set_lora(self, name: str, weight: float) -> None:
        """Change the weight of a loaded LoRA; 0 leaves the stock layers alone.

        Raises:
            ValueError: no LoRA of that name, or no finite weight.
        """
        self.lora_set.set_weights({**self.lora_set.named([name]), name: check_weight(weight)})

    def unload_lora(self, name: str | None = None) -> None:
        """Take one LoRA off, or with None all but the few-step LoRA; what is left is as it was before.

        Raises:
            ValueError: no LoRA of that name, or the few-step LoRA, whose scheduler would stay.
        """
        if name == FEW_STEPS:
            raise ValueError("the few-step LoRA came with fast=…: make a pipeline without it")
        self.lora_set.unload([each for each in self.loras if each != FEW_STEPS] if name is None else [name])

    @contextmanager
    def weighted_loras(self, weights: Mapping[str, float]) -> Iterator[None]:
        """The pipeline with other weights of some LoRAs inside the `with`."""
        before = self.loras
        self.lora_set.set_weights({**before, **weights})
        try:
            yield
        finally:
            self.lora_set.set_weights(before)

    def use_few_steps(self, location: str | None) -> None:
        """Load a few-step LoRA with the scheduler that it was distilled for; None changes nothing.

        It is merged into the weights where they are plain; quantised or offloaded ones keep it beside them.
        """
        if location is not None:
            self.lora_set.load(location, 1.0, FEW_STEPS)
            self.lora_set.merge(FEW_STEPS)
            self.pipe.scheduler = few_step_scheduler()

    def describe_loras(self, few_steps: str | None, is_loaded: bool) -> dict[str, Any]:
        """What LoRAs add to a key: the few-step file, and name, weight and digest of each of the others."""
        adapters = self.lora_set.describe() if is_loaded else {}
        adapters.pop(FEW_STEPS, None)  # loaded with the editor; its weight is in the transformer's digest
        return {"few_steps": lora_revision(few_steps), "adapters": adapters}
