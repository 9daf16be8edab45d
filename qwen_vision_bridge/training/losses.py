"""What a step of training costs: samples drawn for it, and the losses of each process's share of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..specs import step_seed
from .config import TrainingSettings
from .flow_matching import Flow
from .frozen_lm import TEMPLATE_PREFIX_TOKENS, Reader, Rows
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
    hard: Tensor | None = None
    """Questions that the baseline gets wrong, by index; found when they are first asked for."""

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
        if kind == "perceive" and settings.hard_share:
            self.samples = _harder(train_data, self.samples, step, settings)
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
        features, baseline = learner.see(self.pack, samples)
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
        if self.settings.anchor:
            away = distance(features, baseline).sum() / self.whole
            losses[f"anchor/{self.kind}"] = self.settings.anchor * away
        if self.settings.match_statistics:
            away = strangeness(features, baseline).sum() / self.whole
            losses[f"statistics/{self.kind}"] = self.settings.match_statistics * away
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


def find_hard(train_data: TrainData, batch: int = 64) -> Tensor:
    """The questions that the baseline gets wrong, by index."""
    pack, rows, found = train_data.perceive, train_data.rows["perceive"], []
    for members in pack.layouts.values():
        for samples in members.split(batch):
            part = rows.at(samples).shortened().to(train_data.reader.device)
            missed = train_data.reader.misses(pack.rows("vision", samples), part, pack.grid_of(samples))
            found.append(samples[missed.cpu()])
    return torch.cat(found)


def _harder(train_data: TrainData, samples: Tensor, step: int, settings: TrainingSettings) -> Tensor:
    """The samples with a share of them exchanged for hard ones of the same layout, evenly spread."""
    if train_data.hard is None:
        train_data.hard = find_hard(train_data)
    (members,) = (part for part in train_data.perceive.layouts.values() if bool((part == samples[0]).any()))
    options = members[torch.isin(members, train_data.hard)]
    if not len(options):
        return samples
    generator = torch.Generator().manual_seed(step_seed(settings.seed, step + 500_000_000))
    drawn = options[torch.randint(len(options), (len(samples),), generator=generator)]
    places = torch.arange(1, len(samples) + 1) * settings.hard_share
    return torch.where(places.floor() > (places - settings.hard_share).floor(), drawn, samples)


def distance(features: Tensor, baseline: Tensor) -> Tensor:
    """Mean squared update in squared RMS of the baseline, one number a sample, (B,)."""
    size = baseline.square().mean(-1, keepdim=True).clamp_min(1e-12)
    return ((features - baseline).square() / size).mean((1, 2))


def strangeness(features: Tensor, baseline: Tensor) -> Tensor:
    """How far each channel's mean and spread over an image's tokens are from the baseline's, (B,).

    In squared spreads of the baseline's channel over the image.
    """
    spread = baseline.std(1).clamp_min(1e-6)  # (B, D)
    means = (features.mean(1) - baseline.mean(1)) / spread
    spreads = (features.std(1) - baseline.std(1)) / spread
    return (means.square() + spreads.square()).mean(-1)
