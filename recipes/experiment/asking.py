"""Perception: the held-out questions of the cases through every arm, as records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vision_bridge.evaluation.statistics import BASELINE
from qwen_vision_bridge.evaluation.vqa import score
from qwen_vision_bridge.io import write_whole
from qwen_vision_bridge.training.trainable import TrainableBridge
from qwen_vision_bridge.training.validation import Answer, answer_questions

from .bench import Bench, Untouched
from .designs import EXTRA

Record = dict[str, Any]


class Exam(NamedTuple):
    """What an arm is asked."""

    split: str
    groups: tuple[str, ...]
    count: int
    """Cases a group."""
    strength: float = 1.0
    only: str | None = None
    """One kind of question alone."""

    @property
    def name(self) -> str:
        """Of the folder that its records are kept in."""
        shown = [self.split, str(self.count), *([] if self.only is None else [self.only])]
        return "-".join([*shown, *([] if self.strength == 1.0 else [f"strength-{self.strength:g}"])])

    def kept(self, folder: Path, group: str, arm: str, seed: int) -> Path:
        """Where the records of an arm and group are."""
        return folder / "asked" / self.name / f"{group}-{arm}-seed{seed}.jsonl"


def ask(bench: Bench, arm: str, seed: int, exams: Sequence[Exam]) -> list[Record]:
    """Records of one arm and seed: those that are kept, or asked now; `baseline` sees through no bridge."""
    records, loaded = [], None
    for exam in exams:
        for group in exam.groups:
            kept = exam.kept(bench.folder, group, arm, seed)
            if not kept.is_file():
                loaded = loaded or _loaded(bench, arm, seed)
                keep_records(kept, _asked(bench, loaded, arm, seed, group, exam))
            records += read_records(kept)
    return records


def keep_records(path: Path, records: Iterable[Record]) -> None:
    """Write records, a line each; the file appears whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_records(path: Path) -> list[Record]:
    """The records of a file that `keep_records` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _loaded(bench: Bench, arm: str, seed: int) -> Any:
    if arm == BASELINE:
        return Untouched(), bench.reader()
    return bench.load(EXTRA[arm], seed)


def _asked(bench: Bench, loaded: Any, arm: str, seed: int, group: str, exam: Exam) -> Iterator[Record]:
    pack, samples = bench.questions(group, exam.split, exam.count)
    learner, reader = loaded
    if isinstance(learner, TrainableBridge):
        learner.strength = exam.strength
    for answer in answer_questions(learner, reader, pack, exam.only):
        case, question = samples.asked[answer.sample]
        yield {
            "arm": arm,
            "seed": seed,
            "split": exam.split,
            "group": group,
            "difficulty": case.difficulty,
            "kind": case.kind,
            "case": f"{case.case_id}:{question.kind}",
            "asked": question.kind,
            "strength": exam.strength,
            "said": answer.generated,
            "wanted": answer.expected,
            "metrics": _scored(answer, question),
        }


def _scored(answer: Answer, question: Any) -> dict[str, float]:
    values = score(question, answer.generated)
    if words := (answer.letters if question.kind == "read" else []):
        values["letters"] = sum(map(sum, words)) / sum(map(len, words))
    return values
