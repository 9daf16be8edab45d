"""What can be trained: a bridge, and the baseline that a user would try instead, a LoRA of the same size.

Both give the vision features that the frozen language model reads; the LoRA leaves them as they are and
learns inside the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..bridge import BridgeConfig, VisionBridge, count_parameters
from ..controls import target_levels
from .config import Control
from .packs import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Trainable(Protocol):
    """Something between the frozen models that learns."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its trained parameters by name."""

    def vision_features(self, pack: Pack, samples: Tensor) -> Tensor:
        """Features (B, N, D) for the language model, in float32."""

    def save(self, folder: Path, card: Mapping[str, str] | None = None) -> None:
        """Write it into a folder, so that it loads by itself; `card` holds parts of a bridge's card."""


class TrainableBridge:
    """A bridge that sees its own sample's levels, another sample's, or the target's own features.

    Args:
        features: `own`, or one of the two controls, `shuffled` and `target`.
        strength: of the update while training.
        seed: of the shuffling.
    """

    def __init__(
        self, bridge: VisionBridge, features: Control = "own", strength: float = 1.0, seed: int = 0
    ) -> None:
        self.bridge, self.features, self.strength, self.seed = bridge, features, strength, seed
        bridge.requires_grad_(True)
        self._partners: dict[int, Tensor] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.bridge.named_parameters())

    def vision_features(self, pack: Pack, samples: Tensor) -> Tensor:
        baseline = pack.rows("vision", samples).float()
        return self.bridge(self.levels(pack, samples, baseline), baseline, self.strength).features

    def levels(self, pack: Pack, samples: Tensor, baseline: Tensor) -> list[Tensor]:
        """What the bridge sees of samples, L × (B, N, source_dim)."""
        config = self.bridge.config
        if self.features == "target":
            flat = baseline.flatten(0, 1)  # (B·N, D)
            levels = target_levels(config)(flat, ((len(flat), 1),)).features
            return [levels[name].view(*baseline.shape[:2], -1) for name in config.levels]
        if self.features == "shuffled":
            if id(pack) not in self._partners:
                self._partners[id(pack)] = pack.partners(self.seed)
            samples = self._partners[id(pack)][samples]
        return [pack.rows(name, samples) for name in config.levels]

    def save(self, folder: Path, card: Mapping[str, str] | None = None) -> None:
        config = asdict(self.bridge.config)
        self.bridge.save_pretrained(folder, config=config, model_card_kwargs=dict(card or {}))


class LoraBaseline:
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) in the target's language model, about as large as a bridge.

    The adapter is in peft's layout: `PeftModel.from_pretrained(pipe.text_encoder, folder)` loads it.

    Args:
        model: the target, changed in place. config: of the bridge whose size it matches.
        seed: of its initial weights.
    """

    def __init__(self, model: PreTrainedModel, config: BridgeConfig, seed: int = 0) -> None:
        from peft import LoraConfig, get_peft_model

        modules = model.model.language_model.named_modules()
        layers = [layer for name, layer in modules if name.rpartition(".")[2] in LORA_LAYERS]
        per_rank = sum(layer.in_features + layer.out_features for layer in layers)
        rank = max(1, round(count_parameters(VisionBridge(config)) / per_rank))
        pattern = rf".*language_model\..*\.({'|'.join(LORA_LAYERS)})"
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(model, lora)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def vision_features(self, pack: Pack, samples: Tensor) -> Tensor:
        return pack.rows("vision", samples).float()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model without its adapter."""
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path, card: Mapping[str, str] | None = None) -> None:
        self.model.save_pretrained(folder, save_embedding_layers=False)
