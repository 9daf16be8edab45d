"""What a run has to do: an image of every case in every arm, and the questions; each known by its key.

A key is a digest of everything that decides a record, so a folder can hold records of many runs and none is
ever taken for another's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..images import image_digest
from ..io import digest_of
from ..pipeline import EnhancedQwenImageEdit
from ..synthetic.cases import GROUPS
from .arms import Arm, find_partners
from .vqa import Question, questions_of

SAFE_ID = re.compile(r"[\w][\w.-]{0,120}")
OTHER = "other"  # the group of cases from files that name none


@dataclass(frozen=True, eq=False)
class Job:
    """One image to make, or one question to ask."""

    case: Any
    arm: Arm
    question: Question | None
    key: str

    @property
    def level(self) -> str:
        """`edit` or `perception`."""
        return "edit" if self.question is None else "perception"


@dataclass
class Run:
    """Everything that stays the same over a run."""

    pipeline: EnhancedQwenImageEdit
    folder: Path
    arms: Sequence[Arm]
    seed: int
    options: dict[str, Any]
    cases: dict[str, Any]
    batch: int = 1
    """Edits that are denoised together; 1 is the stock call, one by one."""
    partners: dict[str, str | None] = field(default_factory=dict)
    """Whose source features a shuffled arm sees."""
    known: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Digests that many keys share: weights and images are hashed once a run, not once a job."""

    def __post_init__(self) -> None:
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch_arms is a whole number from 1, not {self.batch!r}")
        if any(arm.features == "shuffled" for arm in self.arms):
            grids = {name: self.pipeline.condition_grids(case.images) for name, case in self.cases.items()}
            cycle = find_partners(grids, self.seed)
            self.partners = {name: self._other(name, cycle) for name in cycle}

    def _other(self, name: str, cycle: Mapping[str, str | None]) -> str | None:
        """The next case of the cycle with other images: another prompt on the same ones is no control."""
        partner = cycle[name]
        while partner not in (None, name) and self.shown(partner) == self.shown(name):
            partner = cycle[partner]
        return None if partner == name else partner

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this name."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def shown(self, name: str) -> list[str]:
        """Digests of a case's images."""
        case = self.cases[name]
        return self.once(("images", name), lambda: [image_digest(image) for image in case.images])

    def seed_of(self, case: Any) -> int:
        """The seed of a case's noise: its own, and the same in every arm."""
        return int(digest_of([self.seed, case.case_id])[:7], 16)


def check_ids(cases: Sequence[Any]) -> None:
    """Refuse cases that cannot be told apart on disk.

    Raises:
        ValueError: no cases, an id that is no file name, or one that two cases have.
    """
    if not cases:
        raise ValueError("there are no cases to evaluate: give at least one")
    seen: set[str] = set()
    for case in cases:
        if not SAFE_ID.fullmatch(case.case_id):
            raise ValueError(
                f"a case's id is a file name of letters, digits, '.', '_', '-': {case.case_id!r}"
            )
        if case.case_id in seen:
            raise ValueError(f"two cases have the id {case.case_id!r}: every case needs its own")
        seen.add(case.case_id)


def plan(run: Run, perception: bool) -> tuple[list[Job], list[str]]:
    """Every job in the order of the results, and in words what cannot be done."""
    jobs, unpaired = [], 0
    groups = {name: index for index, name in enumerate((*GROUPS, OTHER))}
    cases = sorted(run.cases.values(), key=lambda case: (groups[case.group], case.case_id))
    for asked in (True, False):
        for case in cases:
            for question in (questions_of(case) if perception else []) if asked else [None]:
                for arm in run.arms:
                    if arm.features == "shuffled" and run.partners[case.case_id] is None:
                        unpaired += question is None
                    else:
                        jobs.append(Job(case, arm, question, _key(run, case, arm, question)))
    if not unpaired:
        return jobs, []
    return jobs, [f"shuffled: {unpaired} cases have no other on the same grid to take features from"]


def failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records with an error, in words."""
    failed = [record for record in records if record["error"]]
    return [f"{record['case_id']}, {record['arm']}: {record['error']}" for record in failed]


def content_key(run: Run, case: Any, arm: Arm, batched: bool) -> str:
    """Digest of everything that decides an image.

    Images made in batches have keys of their own, since their last bits are not those of one alone.
    """
    pipeline, family = run.pipeline, run.pipeline.family
    editor = run.once("editor", lambda: pipeline.fingerprint(False))
    made: dict[str, Any] = {"editor": editor, "device": pipeline.device.type}
    if batched:
        made["batched"] = True
    if arm.bridge is not None:
        source = run.once("source", lambda: pipeline.fingerprint(True)["source"])
        made |= {"arm": run.once(("arm", arm.name), arm.fingerprint), "source": source}
        if arm.features == "shuffled" and (partner := run.partners[case.case_id]):
            made["partner"] = run.shown(partner)
    defaults = {"num_inference_steps": family.steps, "true_cfg_scale": family.true_cfg_scale}
    options = sorted((defaults | run.options).items())
    return digest_of([made, run.shown(case.case_id), case.prompt, run.seed_of(case), options])


def _key(run: Run, case: Any, arm: Arm, question: Question | None) -> str:
    """Digest of everything that decides a record: its image, the truth it is measured by, its labels."""
    truth = run.once(("truth", case.case_id), lambda: _truth(case))
    labels = [case.case_id, case.group, case.kind, case.difficulty, arm.name]
    batched = question is None and run.batch > 1
    return digest_of([content_key(run, case, arm, batched), truth, labels, question])


def _truth(case: Any) -> list[Any]:
    truth = [case.source_text, case.expected_text, str(getattr(case, "boxes", ()))]
    truth += ["" if case.target is None else image_digest(case.target)]
    return [*truth, "" if case.edit_mask is None else digest_of(np.packbits(case.edit_mask).tolist())]
