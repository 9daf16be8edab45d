"""Losses of one training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..specs import step_seed
from .config import Kind, TrainingSettings
from .flow_matching import FlowMatching
from .frozen_lm import TEMPLATE_PREFIX_TOKENS, FrozenLanguageModel, TextBatch
from .packs import Pack
from .trainable import Trainable


@dataclass
class TrainData:
    """Packs of features with their tokenized texts, and the frozen models that the losses go through."""

    language_model: FrozenLanguageModel
    perceive: Pack | None = None
    """Questions with answers."""
    edit: Pack | None = None
    """Instructions with the latents of both images."""
    flow: FlowMatching | None = None
    """Needed for edits."""
    texts: dict[Kind, TextBatch] = field(init=False)

    def __post_init__(self) -> None:
        if not self.packs:
            raise ValueError("training needs a pack of questions, of edits, or both")
        if self.edit is not None and self.flow is None:
            raise ValueError("a pack of edits needs the pipeline's transformer for its loss")
        tokenize = self.language_model.tokenize
        self.texts = {kind: tokenize(pack.texts(), kind == "edit") for kind, pack in self.packs.items()}
        self.empty_prompt = tokenize([(" ", None)], edit=True)

    @property
    def packs(self) -> dict[Kind, Pack]:
        """The packs that there are, by kind."""
        packs: dict[Kind, Pack | None] = {"perceive": self.perceive, "edit": self.edit}
        return {kind: pack for kind, pack in packs.items() if pack is not None}


class Batch:
    """The samples of one kind in one step, of all processes, and everything random about them.

    Args:
        size: samples of all processes and accumulated parts together.
    """

    def __init__(
        self, train_data: TrainData, kind: Kind, step: int, size: int, settings: TrainingSettings
    ) -> None:
        self.train_data, self.kind, self.settings, self.size = train_data, kind, settings, size
        self.pack = train_data.packs[kind]
        self.samples = self.pack.draw(step, size, settings.seed)
        empty_length = int(train_data.empty_prompt.prompt_lengths[0])
        self.texts = train_data.texts[kind].select(self.samples).trimmed(empty_length)
        if kind == "edit":
            generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
            self.latent_grid = rows, columns = self.pack.lines[int(self.samples[0])]["latents"]
            width = self.pack.fields["after"][0].shape[-1]
            self.noise = torch.randn(size, rows * columns, width, generator=generator)
            self.time_noise = torch.randn(size, generator=generator)
            self.dropped = torch.rand(size, generator=generator) < settings.condition_dropout

    def losses(self, trainable: Trainable, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses whose sum over all parts is the step's mean loss, and metrics likewise."""
        features = trainable.vision_features(self.pack, self.samples[part])
        if self.kind == "edit":
            error = self._velocity_error(features, part) / self.size
            return {"edit": self.settings.edit_weight * error}, {"velocity": error}
        language_model, total = self.train_data.language_model, float(self.texts.weights.sum())
        texts = self.texts.select(part).to(language_model.device)
        grid = self.pack.grid_of(self.samples[part])
        error, right, _ = language_model.cross_entropy(features, texts, grid)
        return {"answers": error / total}, {"right": right / total}

    def _velocity_error(self, features: Tensor, part: slice) -> Tensor:
        language_model, samples = self.train_data.language_model, self.samples[part]
        # Some instructions are replaced by the empty prompt.
        texts, empty, dropped = self.texts.select(part), self.train_data.empty_prompt, self.dropped[part]
        empty_ids = torch.zeros_like(texts.ids[0])
        empty_ids[: int(empty.prompt_lengths[0])] = empty.ids[0]
        ids = torch.where(dropped[:, None], empty_ids, texts.ids).to(language_model.device)
        lengths = torch.where(dropped, empty.prompt_lengths[0], texts.prompt_lengths)
        grid = self.pack.grid_of(samples)
        states = language_model.hidden_states(features, ids, grid, edit=True, first=TEMPLATE_PREFIX_TOKENS)
        before_text = states.shape[1] - ids.shape[1]
        mask = torch.arange(states.shape[1])[None] < before_text + lengths[:, None]
        assert self.train_data.flow is not None  # edits are trained through it
        return self.train_data.flow.losses(
            self.pack.rows("references", samples),
            self.pack.rows("after", samples),
            states,
            mask.to(states.device),
            self.latent_grid,
            self.noise[part].to(states.device),
            self.time_noise[part].to(states.device),
        ).sum()
