"""What a step of training costs: samples drawn for it, and the losses of each process's share of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..specs import step_seed
from ..synthetic.tokenizer import TEMPLATE_PREFIX_TOKENS
from .config import TrainingSettings
from .flow_matching import Flow
from .frozen_lm import Reader, Rows
from .packs import Pack
from .trainable import Learner


@dataclass
class TrainData:
    """What a learner learns from: packs with their texts as tokens."""

    reader: Reader
    perceive: Pack | None = None
    edit: Pack | None = None
    flow: Flow | None = None
    rows: dict[str, Rows] = field(default_factory=dict)
    nothing: Rows | None = None
    """The prompt that guidance calls empty."""

    def __post_init__(self) -> None:
        if self.perceive is None and self.edit is None:
            raise ValueError("there is nothing to learn from: give a pack of questions, of edits, or both")
        if self.edit is not None and self.flow is None:
            raise ValueError("a pack of edits needs the pipeline's transformer to learn through")
        for name, pack in (("perceive", self.perceive), ("edit", self.edit)):
            if pack is not None:
                self.rows[name] = self.reader.rows(pack.texts(), name == "edit")
        self.nothing = self.reader.rows([(" ", None)], edit=True)


class Batch:
    """The samples of one kind in one step, of all processes, and everything random about them.

    Args:
        whole: samples of all processes and accumulated parts together.
    """

    def __init__(
        self, train_data: TrainData, kind: str, step: int, whole: int, settings: TrainingSettings
    ) -> None:
        self.train_data, self.kind, self.settings, self.whole = train_data, kind, settings, whole
        self.pack: Pack = getattr(train_data, kind)
        self.samples = self.pack.draw(step, whole, settings.seed)
        rows = train_data.rows[kind].at(self.samples)
        self.rows = rows.shortened(int(train_data.nothing.lengths[0]))
        self.total = rows.weights.sum()
        self.generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
        if kind == "edit":
            shape = self.pack.lines[int(self.samples[0])]["latents"]
            self.shape = (shape[0], shape[1])
            count = shape[0] * shape[1]
            width = self.pack.fields["after"].shape[-1]
            self.noise = torch.randn(whole, count, width, generator=self.generator)
            self.spread = torch.randn(whole, generator=self.generator)
            self.dropped = torch.rand(whole, generator=self.generator) < settings.condition_dropout

    def losses(self, learner: Learner, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses whose sum over all parts is the step's mean loss, and figures likewise."""
        samples = self.samples[part]
        features, _ = learner.see(self.pack, samples)
        figures: dict[str, Tensor] = {}
        if self.kind == "perceive":
            rows = self.rows.at(part).to(self.train_data.reader.device)
            wrong, right, _ = self.train_data.reader.cross_entropy(features, rows, self.pack.grid_of(samples))
            losses = {"answers": wrong / float(self.total)}
            figures = {"right": right / float(self.total)}
        else:
            error = self._edit(features, samples, part) / self.whole
            losses = {"edit": self.settings.edit_weight * error}
            figures = {"velocity": error}
        return losses, figures

    def _edit(self, features: Tensor, samples: Tensor, part: slice) -> Tensor:
        reader, flow = self.train_data.reader, self.train_data.flow
        rows, device = self.rows.at(part), reader.device
        ids, lengths = rows.ids, rows.lengths
        empty = self.train_data.nothing
        without = torch.zeros_like(ids[0])
        without[: int(empty.lengths[0])] = empty.ids[0]
        dropped = self.dropped[part]
        ids = torch.where(dropped[:, None], without, ids).to(device)
        lengths = torch.where(dropped, empty.lengths[0], lengths)
        grid = self.pack.grid_of(samples)
        states = reader.states(features, ids, grid, edit=True, cut=TEMPLATE_PREFIX_TOKENS)
        before = states.shape[1] - ids.shape[1]
        real = torch.arange(states.shape[1])[None] < before + lengths[:, None]
        return flow.losses(
            self.pack.rows("references", samples),
            self.pack.rows("after", samples),
            states,
            real.to(device),
            self.shape,
            self.noise[part].to(device),
            self.spread[part].to(device),
        ).sum()
