"""The frozen models of a training run, each loaded when it is first needed and by the stock ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .packs import See

if TYPE_CHECKING:
    from .features import FeatureEncoder
    from .flow_matching import Flow
    from .frozen_lm import Reader
    from .run import RunConfig


class FrozenModels:
    """The frozen models of a run, each loaded when it is first needed."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.device = run, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._encoder: Any = None
        self._pipeline: Any = None
        self._target: Any = None

    @property
    def encoder(self) -> FeatureEncoder:
        """Both vision towers."""
        from .features import FeatureEncoder

        if self._encoder is None:
            self._encoder = FeatureEncoder(self.run.family, self.device, self.dtype, self.run.teacher)
        return self._encoder

    def free_encoder(self) -> None:
        """Free the towers, where they were loaded."""
        if self._encoder is not None:
            self._encoder.close()

    @property
    def pipe(self) -> Any:
        """The stock edit pipeline, for edits alone."""
        from ..pipeline import EnhancedQwenImageEdit

        if self._pipeline is None:
            self._pipeline = EnhancedQwenImageEdit(
                self.run.family, "fresh", self.run.load_in_8bit, device=self.device, dtype=self.dtype
            )
        return self._pipeline.pipe

    @property
    def target(self) -> Any:
        """The target with its language model; the pipeline's own where edits are learnt too."""
        if "edit" in self.run.kinds:
            return self.pipe.text_encoder
        if self._target is None:
            from ..loading.towers import load_whole

            self._target = load_whole(self.run.family.target, self.device, self.dtype, self.run.load_in_8bit)
        return self._target

    def reader(self) -> Reader:
        """What reads features: the target's language model."""
        from ..loading.towers import load_processor
        from .frozen_lm import Reader

        spec, run = self.run.family.target, self.run
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        checkpointing, learning = run.gradient_checkpointing, run.rival is not None
        return Reader(self.target, processor, run.family, checkpointing, learning)

    def flow(self) -> Flow:
        """What edits are learnt through: the pipeline's transformer."""
        from .flow_matching import Flow

        return Flow(self.pipe, self.run.family.editor, self.run.gradient_checkpointing)

    def see(self, kind: str) -> See:
        """What the frozen models make of samples of a kind."""
        encoder = self.encoder
        if kind == "perceive":
            return encoder.see
        flow = self.flow()
        return lambda samples: [
            one | other for one, other in zip(encoder.see(samples), flow.see(samples), strict=True)
        ]
