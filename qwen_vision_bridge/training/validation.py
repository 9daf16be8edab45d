"""How well held-out questions are answered through a learner: by greedy replies, many images at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..case import exact_text
from .config import TrainingSettings
from .frozen_lm import Reader
from .losses import Batch, TrainData
from .packs import Pack
from .trainable import BridgeLearner, Learner

GATES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
BATCH = {"cpu": 64, "cuda": 512}  # images


class Answer(NamedTuple):
    """One reply to one held-out question."""

    sample: int
    prompt: str
    wanted: str
    said: str

    @property
    def kind(self) -> str:
        """`read`, `locate`, `count`, or `other`."""
        starts = {"What does it say": "read", "Where is": "locate", "How many": "count"}
        return next((kind for start, kind in starts.items() if self.prompt.startswith(start)), "other")

    @property
    def right(self) -> float:
        """1.0 where the reply is exact, spaces and case aside."""
        return exact_text(self.said, self.wanted)

    @property
    def letters(self) -> list[list[bool]]:
        """Of a reading: for each word that is there, which letters are said at their place."""
        if self.wanted == "nothing":
            return []
        words = self.wanted.split("/")
        heard = self.said.split("/") + [""] * len(words)
        return [
            [a == b for a, b in zip(said.ljust(len(word)), word, strict=False)]
            for said, word in zip(heard, words, strict=False)
        ]


@torch.no_grad()
def examine(
    learner: Learner | None, reader: Reader, pack: Pack, only: str | None = None, most: int | None = None
) -> list[Answer]:
    """Greedy replies to a pack's questions; without a learner those of the baseline.

    Args:
        only: a kind of question, see `Answer.kind`. most: the first so many alone.
    """
    asked: dict[tuple, list[int]] = defaultdict(list)
    lengths = reader.rows([(prompt, None) for prompt, _ in pack.texts()]).lengths.tolist()
    layout_of = {int(i): name for name, members in pack.layouts.items() for i in members}
    texts = pack.texts()
    chosen = [i for i, text in enumerate(texts) if only in (None, Answer(i, *text, "").kind)]
    for index in chosen[:most]:
        asked[layout_of[index], lengths[index]].append(index)
    answers, size = [], BATCH[reader.device.type]
    for members in asked.values():
        for first in range(0, len(members), size):
            samples = torch.tensor(members[first : first + size])
            shown = features_of(learner, pack, samples)
            said = reader.reply(shown, [texts[index][0] for index in samples.tolist()], pack.grid_of(samples))
            answers += [
                Answer(index, *texts[index], reply)
                for index, reply in zip(samples.tolist(), said, strict=True)
            ]
    return sorted(answers)


def features_of(learner: Learner | None, pack: Pack, samples: Tensor) -> Tensor:
    """What the language model is shown of samples, (B, N, D)."""
    return pack.rows("vision", samples).float() if learner is None else learner.see(pack, samples)[0]


@torch.no_grad()
def predict(
    learner: Learner | None, train_data: TrainData, pack: Pack, most: int | None = None
) -> dict[str, float]:
    """Cross-entropy of a pack's replies, and the share of their tokens that is predicted right.

    Args:
        most: of each layout only the first so many.
    """
    rows = train_data.reader.rows(pack.texts())
    sums = torch.zeros(3)
    for members in (members[:most] for members in pack.layouts.values()):
        for samples in members.split(BATCH[train_data.reader.device.type]):
            part = rows.at(samples).shortened().to(train_data.reader.device)
            features = features_of(learner, pack, samples)
            found = train_data.reader.cross_entropy(features, part, pack.grid_of(samples))
            sums += torch.stack(found).float().cpu()
    return {"loss": float(sums[0] / sums[2]), "right": float(sums[1] / sums[2])}


@torch.no_grad()
def choose_gate(learner: BridgeLearner, train_data: TrainData, samples: int = 512) -> float:
    """Set a calibrated bridge's gate to the value of `GATES` under which the language model answers best.

    Regression knows nothing of the model that reads the features: replacing them whole does harm where a
    small share of it helps. The first so many samples of the train_data are asked, none that validates.
    """
    losses = {}
    for gate in GATES:
        learner.bridge.gate.fill_(gate)
        losses[gate] = predict(learner, train_data, train_data.perceive, samples)["loss"]
    best = min(losses, key=lambda gate: losses[gate])
    learner.bridge.gate.fill_(best)
    return best


@torch.no_grad()
def edit_error(learner: Learner, train_data: TrainData, batch: int = 32) -> float:
    """The flow-matching loss of the edits, prompts never left out; the same noise in every call."""
    settings = TrainingSettings(condition_dropout=0.0, edit_weight=1.0)
    count, error = -(-len(train_data.edit) // batch), 0.0
    for turn in range(count):
        plan = Batch(train_data, "edit", turn, batch, settings)
        losses, _ = plan.losses(learner, slice(0, batch))
        error += float(losses["edit"]) / count
    return error


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Shares right by kind of question, and of readings the share of letters and of words."""
    found: dict[str, Any] = {}
    for kind in sorted({answer.kind for answer in answers}):
        rights = [answer.right for answer in answers if answer.kind == kind]
        found[f"answered/{kind}"] = sum(rights) / len(rights)
    words = [word for answer in answers if answer.kind == "read" for word in answer.letters]
    if words:
        found["letters"] = sum(map(sum, words)) / sum(map(len, words))
        found["words"] = sum(map(all, words)) / len(words)
    return found
