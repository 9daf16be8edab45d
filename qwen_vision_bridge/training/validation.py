"""Validation on held-out samples: losses, and greedy answers to many questions at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import exact_text
from .config import Kind, TrainingSettings
from .frozen_lm import FrozenLanguageModel
from .losses import Batch, TrainData
from .packs import Pack
from .trainable import Trainable, TrainableBridge

GATES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
BATCH = {"cpu": 64, "cuda": 512}  # images
USER_QUESTIONS = 64  # held-out questions of a user's own data that are answered in a validation
QUESTION_KINDS = {"What does it say": "read", "Where is": "locate", "How many": "count"}


class Answer(NamedTuple):
    """A generated answer to one held-out question."""

    sample: int
    prompt: str
    expected: str
    generated: str

    @property
    def kind(self) -> str:
        """`read`, `locate`, `count`, or `other`."""
        return next((k for start, k in QUESTION_KINDS.items() if self.prompt.startswith(start)), "other")

    @property
    def right(self) -> float:
        """1.0 where the answer is exact, up to spaces and case."""
        return exact_text(self.generated, self.expected)

    @property
    def letters(self) -> list[list[bool]]:
        """Of a reading: for each expected word, which of its letters are right."""
        if self.expected == "nothing":
            return []
        words = self.expected.split("/")
        generated = self.generated.split("/") + [""] * len(words)
        return [
            [a == b for a, b in zip(word.ljust(len(expected)), expected, strict=False)]
            for word, expected in zip(generated, words, strict=False)
        ]


def validate(
    trainable: Trainable | None, train_data: TrainData, held_out: dict[Kind, Pack], is_world: bool
) -> dict[str, float]:
    """Figures on held-out samples.

    Args:
        trainable: None is the baseline, which has no figures of edits.
        is_world: answer the reading questions of the synthetic world, else the first of the user's own.
    """
    figures: dict[str, float] = {}
    if "perceive" in held_out:
        kind, limit = ("read", None) if is_world else (None, USER_QUESTIONS)
        figures |= answer_loss(trainable, train_data, held_out["perceive"])
        answers = answer_questions(trainable, train_data.language_model, held_out["perceive"], kind, limit)
        figures |= summarize(answers)
    if "edit" in held_out and trainable is not None:
        edits = TrainData(train_data.language_model, None, held_out["edit"], train_data.flow)
        figures["edit"] = edit_loss(trainable, edits)
    return figures


@torch.no_grad()
def answer_questions(
    trainable: Trainable | None,
    language_model: FrozenLanguageModel,
    pack: Pack,
    kind: str | None = None,
    limit: int | None = None,
) -> list[Answer]:
    """Greedy answers to a pack's questions; without a trainable those of the baseline.

    Args:
        kind: answer questions of this kind only, see `Answer.kind`. limit: the first so many only.
    """
    open_answers = [Answer(i, prompt, answer or "", "") for i, (prompt, answer) in enumerate(pack.texts())]
    lengths = language_model.tokenize([(answer.prompt, None) for answer in open_answers]).prompt_lengths
    layout_of = {int(i): layout for layout, members in pack.layouts.items() for i in members}
    batches: dict[tuple[str, int], list[int]] = defaultdict(list)
    for answer in [answer for answer in open_answers if kind in (None, answer.kind)][:limit]:
        batches[layout_of[answer.sample], int(lengths[answer.sample])].append(answer.sample)
    answers = []
    for members in batches.values():
        for samples in torch.tensor(members).split(BATCH[language_model.device.type]):
            asked = [open_answers[index] for index in samples.tolist()]
            features = vision_features(trainable, pack, samples)
            prompts = [answer.prompt for answer in asked]
            generated = language_model.generate(features, prompts, pack.grid_of(samples))
            answers += [a._replace(generated=text) for a, text in zip(asked, generated, strict=True)]
    return sorted(answers)


def vision_features(trainable: Trainable | None, pack: Pack, samples: Tensor) -> Tensor:
    """Features (B, N, D) for the language model; without a trainable the target's own."""
    if trainable is None:
        return pack.rows("vision", samples).float()
    return trainable.vision_features(pack, samples)


@torch.no_grad()
def answer_loss(
    trainable: Trainable | None, train_data: TrainData, pack: Pack, limit: int | None = None
) -> dict[str, float]:
    """Cross-entropy of a pack's answers, and the share of their tokens that is predicted right.

    Args:
        limit: the first so many samples of each layout only.
    """
    language_model = train_data.language_model
    texts = language_model.tokenize(pack.texts())
    sums = torch.zeros(3)
    for members in pack.layouts.values():
        for samples in members[:limit].split(BATCH[language_model.device.type]):
            part = texts.select(samples).trimmed().to(language_model.device)
            features = vision_features(trainable, pack, samples)
            totals = language_model.cross_entropy(features, part, pack.grid_of(samples))
            sums += torch.stack(totals).float().cpu()
    return {"loss": float(sums[0] / sums[2]), "right": float(sums[1] / sums[2])}


@torch.no_grad()
def choose_gate(trainable: TrainableBridge, train_data: TrainData, samples: int = 512) -> float:
    """Set a calibrated bridge's gate to the value of `GATES` with the lowest answer loss.

    The regression ignores the model that reads the features: replacing them whole can do harm where a small
    share of the update helps. Only training samples are used.
    """
    losses = {}
    for gate in GATES:
        trainable.bridge.gate.fill_(gate)
        losses[gate] = answer_loss(trainable, train_data, train_data.perceive, samples)["loss"]
    best = min(GATES, key=losses.__getitem__)
    trainable.bridge.gate.fill_(best)
    return best


@torch.no_grad()
def edit_loss(trainable: Trainable, train_data: TrainData) -> float:
    """Flow-matching loss of the edits, without dropout of prompts and with the same noise in every call."""
    settings = TrainingSettings(condition_dropout=0.0, edit_weight=1.0)
    assert train_data.edit is not None
    size = settings.train_batch_size
    count, total = -(-len(train_data.edit) // size), 0.0
    for step in range(count):
        losses, _ = Batch(train_data, "edit", step, size, settings).losses(trainable, slice(0, size))
        total += float(losses["edit"]) / count
    return total


def summarize(answers: list[Answer]) -> dict[str, float]:
    """Share of right answers by kind of question, and of readings the share of right letters and words."""
    figures: dict[str, float] = {}
    for kind in sorted({answer.kind for answer in answers}):
        right = [answer.right for answer in answers if answer.kind == kind]
        figures[f"answered/{kind}"] = sum(right) / len(right)
    words = [word for answer in answers if answer.kind == "read" for word in answer.letters]
    if words:
        figures["letters"] = sum(map(sum, words)) / sum(map(len, words))
        figures["words"] = sum(map(all, words)) / len(words)
    return figures
