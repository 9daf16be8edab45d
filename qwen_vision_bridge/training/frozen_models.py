"""The frozen models of a training run, each loaded when it is first needed and by the stock ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .packs import See

if TYPE_CHECKING:
    from .features import Eyes
    from .flow_matching import Flow
    from .frozen_lm import Reader
    from .run import Course


class FrozenModels:
    """The frozen models of a course, each loaded when it is first needed."""

    def __init__(self, course: Course, device: torch.device) -> None:
        self.course, self.device = course, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._eyes: Any = None
        self._pipeline: Any = None
        self._target: Any = None

    @property
    def eyes(self) -> Eyes:
        """Both vision towers."""
        from .features import Eyes

        if self._eyes is None:
            self._eyes = Eyes(self.course.family, self.device, self.dtype, self.course.teacher)
        return self._eyes

    def free_eyes(self) -> None:
        """Free the towers, where they were loaded."""
        if self._eyes is not None:
            self._eyes.close()

    @property
    def pipe(self) -> Any:
        """The stock edit pipeline, for edits alone."""
        from ..pipeline import EnhancedQwenImageEdit

        if self._pipeline is None:
            self._pipeline = EnhancedQwenImageEdit(
                self.course.family, "fresh", self.course.load_in_8bit, device=self.device, dtype=self.dtype
            )
        return self._pipeline.pipe

    @property
    def target(self) -> Any:
        """The target with its language model; the pipeline's own where edits are learnt too."""
        if "edit" in self.course.kinds:
            return self.pipe.text_encoder
        if self._target is None:
            from ..loading.towers import load_whole

            self._target = load_whole(
                self.course.family.target, self.device, self.dtype, self.course.load_in_8bit
            )
        return self._target

    def reader(self) -> Reader:
        """What reads features: the target's language model."""
        from ..loading.processors import load_processor
        from .frozen_lm import Reader

        spec, course = self.course.family.target, self.course
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        checkpointing, learning = course.gradient_checkpointing, course.rival is not None
        return Reader(self.target, processor, course.family, checkpointing, learning)

    def flow(self) -> Flow:
        """What edits are learnt through: the pipeline's transformer."""
        from .flow_matching import Flow

        return Flow(self.pipe, self.course.family.editor, self.course.gradient_checkpointing)

    def see(self, kind: str) -> See:
        """What the frozen models make of lessons of a kind."""
        eyes = self.eyes
        if kind == "perceive":
            return eyes.see
        flow = self.flow()
        return lambda lessons: [
            one | other for one, other in zip(eyes.see(lessons), flow.see(lessons), strict=True)
        ]
