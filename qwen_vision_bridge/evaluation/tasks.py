"""What a run has to do: an edit of every case in every arm, and the questions; each known by its key.

A key is a digest of everything that decides a record, so a folder can hold records of many runs and none is
ever taken for another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..case import GROUPS, OTHER, Case
from ..controls import find_partners
from ..images import image_digest
from ..injection import Grids
from ..io import digest_of
from ..pipeline import EnhancedQwenImageEdit
from ..synthetic.questions import Question, questions_of
from .arms import Arm


@dataclass(frozen=True, eq=False)
class Task:
    """One image to edit, or one question to ask."""

    case: Case
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
    """Of `EnhancedQwenImageEdit.generate`."""
    cases: dict[str, Case]
    batch: int = 1
    """Edits that are denoised together; 1 is the stock call, one by one."""
    partners: dict[str, str | None] = field(default_factory=dict)
    """Whose source features a shuffled arm sees."""

    def __post_init__(self) -> None:
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch_arms is a whole number from 1, not {self.batch!r}")
        if any(arm.features == "shuffled" for arm in self.arms):
            cycle = find_partners(self._grids(), self.seed)
            self.partners = dict.fromkeys(self.cases) | {
                name: self._with_other_images(name, cycle) for name in cycle
            }

    def _grids(self) -> dict[str, Grids]:
        """The grids of every case's images; a case whose images the editor cannot do has none."""
        grids = {}
        for name, case in self.cases.items():
            with suppress(ValueError, ZeroDivisionError):  # comes again, and is recorded, when the case runs
                grids[name] = self.pipeline.condition_grids(case.images)
        return grids

    def _with_other_images(self, name: str, cycle: Mapping[str, str | None]) -> str | None:
        """The next case of the cycle with other images: another prompt on the same ones is no control."""
        partner = cycle[name]
        while partner not in (None, name) and self.images[partner] == self.images[name]:
            partner = cycle[partner]
        return None if partner == name else partner

    @cached_property
    def images(self) -> dict[str, list[str]]:
        """Digests of every case's images."""
        return {name: [image_digest(image) for image in case.images] for name, case in self.cases.items()}

    @cached_property
    def truths(self) -> dict[str, str]:
        """Digest of what each case's edits are measured by."""
        truths = {}
        for name, case in self.cases.items():
            truth = [case.source_text, case.expected_text, str(case.boxes)]
            truth += ["" if case.target is None else image_digest(case.target)]
            truth += ["" if case.edit_mask is None else digest_of(np.packbits(case.edit_mask).tolist())]
            truths[name] = digest_of(truth)
        return truths

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What decides an image, of every arm's models; weights are hashed once a run."""
        editor = {"editor": self.pipeline.fingerprint(False), "device": self.pipeline.device.type}
        prints = {arm.name: editor | {"arm": arm.fingerprint()} for arm in self.arms}
        for arm in self.arms:
            if arm.bridge is not None:
                prints[arm.name]["source"] = self.pipeline.fingerprint(True)["source"]
        return prints

    def seed_of(self, case: Case) -> int:
        """The seed of a case's noise: its own, and the same in every arm."""
        return int(digest_of([self.seed, case.case_id])[:7], 16)


def check_ids(cases: Sequence[Case]) -> None:
    """Refuse cases that cannot be told apart on disk.

    Raises:
        ValueError: no cases, or an id that two cases have.
    """
    if not cases:
        raise ValueError("there are no cases to evaluate: give at least one")
    (name, count), *_ = Counter(case.case_id.casefold() for case in cases).most_common(1)
    if count > 1:
        raise ValueError(f"two cases have the id {name!r}, upper and lower case aside: each needs its own")


def plan(run: Run, edits: bool, perception: bool) -> tuple[list[Task], list[str]]:
    """Every task in the order of the results, and in words what cannot be done."""
    tasks: list[Task] = []
    groups = (*GROUPS, OTHER)
    cases = sorted(run.cases.values(), key=lambda case: (groups.index(case.group), case.case_id))
    asked = [(case, question) for case in cases if perception for question in questions_of(case)]
    for case, question in [*asked, *((case, None) for case in cases if edits)]:
        for arm in run.arms:
            if arm.features != "shuffled" or run.partners[case.case_id] is not None:
                tasks.append(Task(case, arm, question, _key(run, case, arm, question)))
    shuffled = sum(arm.features == "shuffled" for arm in run.arms)
    unpaired = shuffled * sum(partner is None for partner in run.partners.values())
    if not unpaired:
        return tasks, []
    return tasks, [f"shuffled: {unpaired} cases have no other on the same grid to take features from"]


def content_key(run: Run, case: Case, arm: Arm, batched: bool) -> str:
    """Digest of everything that decides an image.

    Images of batches have keys of their own, since their last bits are not those of one alone.
    """
    family = run.pipeline.family
    models = run.fingerprints[arm.name] | {"batched": batched}
    if arm.features == "shuffled" and (partner := run.partners[case.case_id]):
        models["partner"] = run.images[partner]
    defaults = {"num_inference_steps": family.steps, "true_cfg_scale": family.true_cfg_scale}
    options = sorted((defaults | run.options).items())
    return digest_of([models, run.images[case.case_id], case.prompt, run.seed_of(case), options])


def _key(run: Run, case: Case, arm: Arm, question: Question | None) -> str:
    """Digest of everything that decides a record: its image, the truth it is measured by, its labels."""
    labels = [case.case_id, case.group, case.kind, case.difficulty, arm.name]
    batched = question is None and run.batch > 1
    return digest_of([content_key(run, case, arm, batched), run.truths[case.case_id], labels, question])
