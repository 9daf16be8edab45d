"""The frozen models of a training run, each loaded when it is first needed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..loading.towers import load_processor, load_whole
from ..pipeline import EnhancedQwenImageEdit
from .config import Kind, RunConfig
from .features import FeatureEncoder
from .flow_matching import FlowMatching
from .frozen_lm import FrozenLanguageModel
from .packs import Encode

if TYPE_CHECKING:
    from diffusers import QwenImageEditPlusPipeline
    from transformers import PreTrainedModel


class FrozenModels:
    """The frozen models of a run."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.device = run, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @cached_property
    def encoder(self) -> FeatureEncoder:
        """Both vision towers."""
        return FeatureEncoder(self.run.family, self.device, self.dtype, self.run.highres_target)

    @cached_property
    def pipe(self) -> QwenImageEditPlusPipeline:
        """The stock edit pipeline, needed for edits only."""
        family, place = self.run.family, {"device": self.device, "dtype": self.dtype}
        return EnhancedQwenImageEdit(family, "fresh", self.run.load_in_8bit, **place).pipe

    @cached_property
    def target(self) -> PreTrainedModel:
        """The target with its language model; the pipeline's own where edits are trained too."""
        if "edit" in self.run.kinds:
            return self.pipe.text_encoder
        return load_whole(self.run.family.target, self.device, self.dtype, self.run.load_in_8bit)

    @cached_property
    def language_model(self) -> FrozenLanguageModel:
        """The target's language model, which reads the features."""
        spec, run = self.run.family.target, self.run
        processor = load_processor(spec.repo, spec.processor_subfolder, spec.revision, images_only=False)
        options = run.gradient_checkpointing, run.lora_baseline
        return FrozenLanguageModel(self.target, processor, run.family, *options)

    @cached_property
    def flow(self) -> FlowMatching:
        """The pipeline's transformer, through which edits are trained."""
        return FlowMatching(self.pipe, self.run.family.editor, self.run.gradient_checkpointing)

    def encode_function(self, kind: Kind) -> Encode:
        """The function that turns samples of a kind into the fields of a pack."""
        if kind == "perceive":
            return self.encoder.encode
        return lambda samples: [
            features | latents
            for features, latents in zip(self.encoder.encode(samples), self.flow.encode(samples), strict=True)
        ]
