"""Perception: the held-out questions of the cases through every arm, as records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import Bench, Untouched
from designs import Design

from qwen_vision_bridge.comparisons import BASELINE
from qwen_vision_bridge.examining import Answer, examine
from qwen_vision_bridge.learners import BridgeLearner
from qwen_vision_bridge.perception import score
from qwen_vision_bridge.world import GROUPS

Record = dict[str, Any]


def ask_all(
    bench: Bench, found: Sequence[tuple[Design, int, Path]], split: str, count: int, log: Path,
    groups: Sequence[str] = GROUPS[:3],
) -> list[Record]:  # fmt: skip
    """Records of the baseline and of every finished design; those that the log has are not asked again."""
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    have = {(record["arm"], record["seed"], record["split"], record["group"]) for record in done}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for group in groups:
            if (BASELINE, 0, split, group) not in have:
                done += _keep(file, _asked(bench, None, BASELINE, 0, 1.0, split, group, count))
            for design, seed, folder in found:
                if (design.name, seed, split, group) not in have:
                    loaded = bench.load(design, folder, seed)
                    done += _keep(file, _asked(bench, loaded, design.name, seed, 1.0, split, group, count))
    return [record for record in done if record["split"] == split]


def ask_at(
    bench: Bench, design: Design, seed: int, folder: Path, strength: float, split: str, count: int
) -> list[Record]:
    """Records of reading alone, at another strength."""
    learner, reader = bench.load(design, folder, seed)
    assert isinstance(learner, BridgeLearner)
    learner.strength = strength
    records = _asked(bench, (learner, reader), design.name, seed, strength, split, "ocr", count)
    return [record for record in records if record["asked"] == "read"]


def _asked(
    bench: Bench, loaded: Any, arm: str, seed: int, strength: float, split: str, group: str, count: int
) -> Iterator[Record]:
    pack, lessons = bench.questions(group, split, count)
    learner, reader = loaded or (Untouched(), bench.reader())
    for answer in examine(learner, reader, pack):
        case, question = lessons.asked[answer.lesson]
        yield {
            "arm": arm, "seed": seed, "split": split, "group": group, "difficulty": case.difficulty,
            "kind": case.kind, "case": f"{case.case_id}:{question.kind}", "asked": question.kind,
            "strength": strength, "said": answer.said, "wanted": answer.wanted,
            "metrics": _scored(answer, question),
        }  # fmt: skip


def _scored(answer: Answer, question: Any) -> dict[str, float]:
    values = score(question, answer.said)
    if words := (answer.letters if question.kind == "read" else []):
        values["letters"] = sum(map(sum, words)) / sum(map(len, words))
    return values


def _keep(file: Any, records: Iterator[Record]) -> list[Record]:
    """Write a group of an arm, whole."""
    kept = list(records)
    file.write("".join(json.dumps(record) + "\n" for record in kept))
    file.flush()
    return kept
