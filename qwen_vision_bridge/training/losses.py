"""What a step of training costs: lessons drawn for it, and the losses of each process's share of them."""

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
class Study:
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


class StepPlan:
    """The lessons of one kind in one step, of all processes, and everything random about them.

    Args:
        whole: lessons of all processes and accumulated parts together.
    """

    def __init__(self, study: Study, kind: str, step: int, whole: int, settings: TrainingSettings) -> None:
        self.study, self.kind, self.settings, self.whole = study, kind, settings, whole
        self.pack: Pack = getattr(study, kind)
        self.lessons = self.pack.draw(step, whole, settings.seed)
        if kind == "perceive" and settings.hard_share:
            self.lessons = _harder(study, self.lessons, step, settings)
        rows = study.rows[kind].at(self.lessons)
        self.rows = rows.shortened(int(study.nothing.lengths[0]))
        self.total = rows.weights.sum()
        self.generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
        if kind == "edit":
            shape = self.pack.lines[int(self.lessons[0])]["latents"]
            self.shape = (shape[0], shape[1])
            count = shape[0] * shape[1]
            width = self.pack.fields["after"].shape[-1]
            self.noise = torch.randn(whole, count, width, generator=self.generator)
            self.spread = torch.randn(whole, generator=self.generator)
            self.dropped = torch.rand(whole, generator=self.generator) < settings.condition_dropout

    def losses(self, learner: Learner, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses whose sum over all parts is the step's mean loss, and figures likewise."""
        lessons = self.lessons[part]
        features, baseline = learner.see(self.pack, lessons)
        figures: dict[str, Tensor] = {}
        if self.kind == "perceive":
            rows = self.rows.at(part).to(self.study.reader.device)
            wrong, right, _ = self.study.reader.wrongness(features, rows, self.pack.grid_of(lessons))
            losses = {"answers": wrong / float(self.total)}
            figures = {"right": right / float(self.total)}
        else:
            error = self._edit(features, lessons, part) / self.whole
            losses = {"edit": self.settings.edit_weight * error}
            figures = {"velocity": error}
        if self.settings.anchor:
            away = distance(features, baseline).sum() / self.whole
            losses[f"anchor/{self.kind}"] = self.settings.anchor * away
        if self.settings.match_statistics:
            away = strangeness(features, baseline).sum() / self.whole
            losses[f"statistics/{self.kind}"] = self.settings.match_statistics * away
        return losses, figures

    def _edit(self, features: Tensor, lessons: Tensor, part: slice) -> Tensor:
        reader, flow = self.study.reader, self.study.flow
        rows, device = self.rows.at(part), reader.device
        ids, lengths = rows.ids, rows.lengths
        empty = self.study.nothing
        without = torch.zeros_like(ids[0])
        without[: int(empty.lengths[0])] = empty.ids[0]
        dropped = self.dropped[part]
        ids = torch.where(dropped[:, None], without, ids).to(device)
        lengths = torch.where(dropped, empty.lengths[0], lengths)
        grid = self.pack.grid_of(lessons)
        states = reader.states(features, ids, grid, edit=True, cut=TEMPLATE_PREFIX_TOKENS)
        before = states.shape[1] - ids.shape[1]
        real = torch.arange(states.shape[1])[None] < before + lengths[:, None]
        return flow.losses(
            self.pack.rows("references", lessons), self.pack.rows("after", lessons), states,
            real.to(device), self.shape, self.noise[part].to(device), self.spread[part].to(device),
        ).sum()  # fmt: skip


def find_hard(study: Study, batch: int = 64) -> Tensor:
    """The questions that the baseline gets wrong, by index."""
    pack, rows, found = study.perceive, study.rows["perceive"], []
    for members in pack.layouts.values():
        for lessons in members.split(batch):
            part = rows.at(lessons).shortened().to(study.reader.device)
            missed = study.reader.misses(pack.rows("vision", lessons), part, pack.grid_of(lessons))
            found.append(lessons[missed.cpu()])
    return torch.cat(found)


def _harder(study: Study, lessons: Tensor, step: int, settings: TrainingSettings) -> Tensor:
    """The lessons with a share of them exchanged for hard ones of the same layout, evenly spread."""
    if study.hard is None:
        study.hard = find_hard(study)
    (members,) = (part for part in study.perceive.layouts.values() if bool((part == lessons[0]).any()))
    options = members[torch.isin(members, study.hard)]
    if not len(options):
        return lessons
    generator = torch.Generator().manual_seed(step_seed(settings.seed, step + 500_000_000))
    drawn = options[torch.randint(len(options), (len(lessons),), generator=generator)]
    places = torch.arange(1, len(lessons) + 1) * settings.hard_share
    return torch.where(places.floor() > (places - settings.hard_share).floor(), drawn, lessons)


def distance(features: Tensor, baseline: Tensor) -> Tensor:
    """Mean squared update in squared RMS of the baseline, one number a lesson, (B,)."""
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
