"""What can be trained: a bridge, and the rival that a user would try instead, a LoRA of as many parameters.

Both give the features that the frozen language model then reads; the rival leaves them as they are and learns
inside the language model.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..bridge import BridgeConfig, VisionBridge, count_parameters
from ..controls import Features, target_levels
from .packs import Pack

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Learner(Protocol):
    """Something trainable between the frozen models."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""

    def see(self, pack: Pack, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) for the language model, and the baseline they came from, in float32."""

    def save(self, folder: Path) -> None:
        """Write what was learnt into a folder, so that it loads by itself."""


class BridgeLearner:
    """A bridge that sees its own sample's levels, another sample's, or the target's own features.

    Args:
        features: the two controls are `shuffled` and `target`, see `controls.Features`.
        strength: of the update while training.
        seed: of the shuffling.
    """

    def __init__(
        self, bridge: VisionBridge, features: Features = "own", strength: float = 1.0, seed: int = 0
    ) -> None:
        self.bridge, self.features, self.strength, self.seed = bridge, features, strength, seed
        bridge.requires_grad_(True)
        self._partners: dict[int, Tensor] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.bridge.named_parameters())

    def see(self, pack: Pack, samples: Tensor) -> tuple[Tensor, Tensor]:
        baseline = pack.rows("vision", samples).float()
        levels = self.levels(pack, samples, baseline)
        return self.bridge(levels, baseline, self.strength).features, baseline

    def levels(self, pack: Pack, samples: Tensor, baseline: Tensor) -> list[Tensor]:
        """What the bridge sees of samples, L × (B, N, source_dim)."""
        config = self.bridge.config
        if self.features == "target":
            flat = baseline.flatten(0, 1)  # (B·N, D)
            made = target_levels(config)(flat, ((len(flat), 1),))
            return [made.features[name].view(*baseline.shape[:2], -1) for name in config.levels]
        if self.features == "shuffled":
            if id(pack) not in self._partners:
                self._partners[id(pack)] = pack.partners(self.seed)
            samples = self._partners[id(pack)][samples]
        return [pack.rows(name, samples) for name in config.levels]

    def save(self, folder: Path) -> None:
        self.bridge.save_pretrained(folder, config=asdict(self.bridge.config))


class LoraLearner:
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) in the target's language model, as large as a bridge.

    The adapter is in peft's layout: `PeftModel.from_pretrained(pipe.text_encoder, folder)` loads it.

    Args:
        model: the target, changed in place. size: parameters to match. seed: of its starting weights.
    """

    def __init__(self, model: nn.Module, size: int, seed: int = 0) -> None:
        from peft import LoraConfig, get_peft_model

        layers = [
            layer
            for name, layer in model.model.language_model.named_modules()
            if name.rpartition(".")[2] in LORA_LAYERS
        ]
        rank = max(1, round(size / sum(layer.in_features + layer.out_features for layer in layers)))
        chosen = rf".*language_model\..*\.({'|'.join(LORA_LAYERS)})"
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(model, config)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def see(self, pack: Pack, samples: Tensor) -> tuple[Tensor, Tensor]:
        baseline = pack.rows("vision", samples).float()
        return baseline, baseline

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, save_embedding_layers=False)


def rival_of(config: BridgeConfig, model: Any, seed: int = 0) -> LoraLearner:
    """A LoRA in the model's language layers of about as many parameters as a bridge of a config."""
    return LoraLearner(model, count_parameters(VisionBridge(config)), seed)
