"""Arms × cases → records: the same edits and questions in every arm, measured and on disk as they come.

A run that was stopped goes on where it was; one that is finished does nothing. Under `accelerate launch` the
cases are dealt out to the processes, and what they find is one result.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .arms import Arm, check_arms, default_arms, find_partners, target_levels
from .cache import VisionCache

# A recipe takes the interval from here.
from .comparisons import Difference, compare_arms
from .comparisons import bootstrap_interval as bootstrap_interval
from .images import image_digest, load_images
from .ledger import Ledger
from .measuring import METRICS, measure
from .perception import Question, ask, questions_of, score, supports
from .pipeline import EnhancedQwenImageEdit
from .processes import Processes
from .records import digest_of, write_picture
from .specs import cache_home
from .world import GROUPS

logger = logging.getLogger(__name__)

SAFE_ID = re.compile(r"[\w][\w.-]{0,120}")
OTHER = "other"  # the group of cases from files that name none


class Evaluation(NamedTuple):
    """What a run found."""

    rows: list[Difference]
    records: list[dict[str, Any]]
    """By level, group, case and arm; the order of the cases and of the work does not matter."""
    left_out: list[str]
    """What could not be compared, and why, in words."""
    provenance: dict[str, Any]
    arms: list[dict[str, Any]]
    seconds: float
    """Wall-clock time of this call."""
    done_before: int
    """Records that an earlier run had left."""


@dataclass(frozen=True, eq=False)
class Job:
    """One picture to make, or one question to ask."""

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
    partners: dict[str, str | None] = field(default_factory=dict)
    cases: dict[str, Any] = field(default_factory=dict)

    def seed_of(self, case: Any) -> int:
        """The seed of a case's noise: its own, and the same in every arm."""
        return int(digest_of([self.seed, case.case_id])[:7], 16)


def evaluate(
    pipeline: EnhancedQwenImageEdit,
    cases: Sequence[Any],
    folder: str | Path,
    arms: Sequence[Arm] | None = None,
    seed: int = 0,
    *,
    strength: float = 1.0,
    perception: bool = True,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Evaluation | None:
    """Run every case in every arm, in the picture and in questions, and compare each arm with the baseline.

    Writes pictures and `results.jsonl` into the folder; `summaries.write_results` writes the rest. A case
    that fails is recorded with its error and the others go on; to try it again, delete its line.

    Args:
        cases: of `world.make_cases`, `casefiles` or `languages`, each with an id of its own.
        arms: None is the pipeline's bridge at `strength`, the baseline and both controls.
        seed: of noise, shuffling and bootstrap.
        perception: whether the target's language model is asked too.
        announce: takes the time that the run is estimated to need, in a sentence, before it starts.
        options: of the edits, as `EnhancedQwenImageEdit.generate` takes them.

    Returns:
        None in processes other than the first.

    Raises:
        ValueError: no cases, ids that are not unique or no file names, arms that cannot be compared.
        OSError: the folder cannot be written to.
    """
    started = time.perf_counter()
    arms = arms or default_arms(pipeline.bridge, pipeline.bridge_name, strength, pipeline.site)
    check_arms(arms)
    _check_ids(cases)
    processes = Processes()
    run = Run(pipeline, Path(folder), arms, seed, dict(options), cases={case.case_id: case for case in cases})
    if any(arm.features == "shuffled" for arm in arms):
        grids = {case.case_id: pipeline.condition_grids(case.pictures) for case in cases}
        run.partners = find_partners(grids, seed)
    jobs, left_out = _plan(run, perception)
    ledger = Ledger(run.folder, processes.index)
    processes.wait()  # no process writes before all have read
    pending = [job for job in jobs if job.key not in ledger.records]
    if announce is not None and processes.is_main:
        announce(_estimate(run, pending, processes.count))
    _work(run, processes.share(sorted({job.case.case_id for job in pending})), pending, ledger)
    processes.wait()
    if not processes.is_main:
        return None
    ledger.merge()
    records = [ledger.records[job.key] for job in jobs]
    left_out += _failures(records)
    rows = compare_arms(records, METRICS, (*GROUPS, OTHER), seed)
    seconds, before = time.perf_counter() - started, len(jobs) - len(pending)
    described = [arm.describe() for arm in arms]
    return Evaluation(rows, records, left_out, pipeline.provenance([seed]), described, seconds, before)


def _check_ids(cases: Sequence[Any]) -> None:
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


def _plan(run: Run, perception: bool) -> tuple[list[Job], list[str]]:
    """Every job in the order of the results, and in words what cannot be done."""
    jobs, lonely = [], 0
    groups = {name: index for index, name in enumerate((*GROUPS, OTHER))}
    cases = sorted(run.cases.values(), key=lambda case: (groups[case.group], case.case_id))
    deaf = sorted({arm.name for arm in run.arms if not supports(arm)}) if perception else []
    for asked in (True, False):
        for case in cases:
            for question in (questions_of(case) if perception else []) if asked else [None]:
                for arm in run.arms:
                    if arm.features == "shuffled" and run.partners[case.case_id] is None:
                        lonely += question is None
                    elif question is None or supports(arm):
                        jobs.append(Job(case, arm, question, _key(run, case, arm, question)))
    left_out = [f"{name}: its site is behind the language model, which is not asked" for name in deaf]
    if lonely:
        left_out.append(f"shuffled: {lonely} cases have no other on the same grid to take features from")
    return jobs, left_out


def _failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [record for record in records if record["error"]]
    return [f"{record['case_id']}, {record['arm']}: {record['error']}" for record in failed]


def _work(run: Run, mine: Sequence[str], pending: Sequence[Job], ledger: Ledger) -> None:
    """Do the pending jobs of some cases, one case after the other with all its arms."""
    from tqdm import tqdm

    by_case: dict[str, list[Job]] = {case_id: [] for case_id in mine}
    for job in pending:
        if job.case.case_id in by_case:
            by_case[job.case.case_id].append(job)
    _extract(run, mine)
    total = sum(map(len, by_case.values()))
    with tqdm(total=total, desc="evaluating", unit="job", disable=total == 0) as bar:
        for case_id, jobs in by_case.items():
            _write_inputs(run, run.cases[case_id])
            sources: dict[str, VisionCache] = {}
            with run.pipeline.sharing_references():
                for job in jobs:
                    ledger.append(_record(run, job, sources))
                    bar.update()


def _extract(run: Run, mine: Sequence[str]) -> None:
    """Source features of all cases into the feature cache: the tower is loaded once, and then freed."""
    if all(arm.bridge is None or arm.features == "target" for arm in run.arms):
        return
    from tqdm import tqdm

    wanted = sorted({*mine, *(partner for name in mine if (partner := run.partners.get(name)))})
    with run.pipeline.keeping_source():
        for case_id in tqdm(wanted, desc="source features", unit="case", disable=not wanted, leave=False):
            try:
                run.pipeline.extract_source(run.cases[case_id].pictures)
            except Exception as error:  # comes again, and is recorded, when the case runs
                logger.debug("%s: %s", case_id, error)


def _record(run: Run, job: Job, sources: dict[str, VisionCache]) -> dict[str, Any]:
    case, question = job.case, job.question
    record: dict[str, Any] = {
        "key": job.key,
        "level": job.level,
        "case_id": case.case_id if question is None else f"{case.case_id}:{question.kind}",
        "group": case.group,
        "kind": case.kind,
        "difficulty": case.difficulty,
        "arm": job.arm.name,
        "prompt": case.prompt if question is None else question.text,
        "seed": run.seed_of(case),
    }
    started = time.perf_counter()
    try:
        found = _edit(run, job, sources) if question is None else _ask(run, job, sources)
    except Exception as error:  # one bad case must not end a run of hours; it is in the results
        logger.warning("%s, %s: %s", record["case_id"], job.arm.name, error)
        found = {"metrics": {}, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds = round(time.perf_counter() - started, 3)
    return {"error": None, **record, **found, "seconds": seconds}


def _edit(run: Run, job: Job, sources: dict[str, VisionCache]) -> dict[str, Any]:
    case, arm, attention = job.case, job.arm, None
    kept = cache_home() / "baselines" / f"{_content_key(run, case, arm)}.png"
    if arm.bridge is None and kept.is_file():
        picture = load_images(kept)[0]
    else:
        pictures = case.pictures if case.references else case.image  # the first edit pipeline takes one only
        picture, attention = run.pipeline.edit(
            pictures, case.prompt, run.seed_of(case), bridge=arm.bridge, source=_source(run, job, sources),
            strength=arm.strength, site=arm.site, **run.options,
        )  # fmt: skip
        if arm.bridge is None:
            write_picture(kept, picture)
    if picture.size != case.image.size:  # the editor works at its own size
        picture = picture.resize(case.image.size)
    # Another bridge's picture of the same case keeps its own name.
    stem = f"{case.group}/{case.case_id}_{arm.name}-{job.key[:6]}"
    write_picture(run.folder / f"{stem}.png", picture)
    found: dict[str, Any] = {"picture": f"{stem}.png", "metrics": measure(case, picture)}
    if attention is not None:
        weights = attention.maps()[-1]  # of the picture that is edited, (gh, gw, L)
        shares = np.clip(np.rint(weights[..., :3] * 255), 0, 255).astype(np.uint8)
        if shares.shape[-1] == 3:
            write_picture(run.folder / f"{stem}_levels.png", Image.fromarray(shares))
            found["attention"] = f"{stem}_levels.png"
        means = weights.reshape(-1, weights.shape[-1]).mean(0).tolist()
        found["level_weights"] = dict(zip(attention.levels, means, strict=True))
    return found


def _ask(run: Run, job: Job, sources: dict[str, VisionCache]) -> dict[str, Any]:
    source = _source(run, job, sources)
    if isinstance(source, VisionCache):
        source = source.split()[-1]  # the question is about the last picture alone
    reply = ask(run.pipeline, job.case.image, job.question, job.arm, source)
    return {"reply": reply, "answer": job.question.answer, "metrics": score(job.question, reply)}


def _source(run: Run, job: Job, sources: dict[str, VisionCache]) -> Any:
    """What the arm's bridge sees in place of, or as, the source's levels."""
    if job.arm.bridge is None:
        return None
    if job.arm.features == "target":
        return target_levels(job.arm.bridge.config)
    case_id = job.case.case_id if job.arm.features == "own" else run.partners[job.case.case_id]
    if case_id not in sources:
        sources[case_id] = run.pipeline.extract_source(run.cases[case_id].pictures)
    return sources[case_id]


def _write_inputs(run: Run, case: Any) -> None:
    shown = [(f"reference{number}", picture) for number, picture in enumerate(case.references, start=1)]
    shown += [("input", case.image)] + ([("target", case.target)] if case.target is not None else [])
    for name, picture in shown:
        write_picture(run.folder / case.group / f"{case.case_id}_{name}.png", picture)


def _content_key(run: Run, case: Any, arm: Arm) -> str:
    """Digest of everything that decides a picture."""
    pipeline, family = run.pipeline, run.pipeline.family
    made: dict[str, Any] = {"editor": pipeline.made_from(False), "device": pipeline.device.type}
    if arm.bridge is not None:
        made |= {"arm": arm.made_from(), "source": pipeline.made_from(True)["source"]}
        if arm.features == "shuffled" and (partner := run.partners[case.case_id]):
            made["partner"] = [image_digest(shown) for shown in run.cases[partner].pictures]
    defaults = {"num_inference_steps": family.steps, "true_cfg_scale": family.true_cfg_scale}
    pictures = [image_digest(shown) for shown in case.pictures]
    return digest_of(
        [made, pictures, case.prompt, run.seed_of(case), sorted((defaults | run.options).items())]
    )


def _key(run: Run, case: Any, arm: Arm, question: Question | None) -> str:
    """Digest of everything that decides a record: its picture, the truth it is measured by, its labels."""
    truth = [case.source_text, case.expected_text, str(getattr(case, "boxes", ()))]
    truth += ["" if case.target is None else image_digest(case.target)]
    truth += ["" if case.edit_mask is None else digest_of(np.packbits(case.edit_mask).tolist())]
    labels = [case.case_id, case.group, case.kind, case.difficulty, arm.name]
    return digest_of([_content_key(run, case, arm), truth, labels, question])


@contextmanager
def _timed() -> Iterator[list[float]]:
    taken, started = [0.0], time.perf_counter()
    yield taken
    taken[0] = time.perf_counter() - started


def _estimate(run: Run, pending: Sequence[Job], processes: int) -> str:
    """How long the pending jobs will take, from two short baseline edits of the first case."""
    edits = sum(job.question is None for job in pending)
    if not edits:
        return f"{len(pending)} questions and no edits are left to do."
    steps = run.options.get("num_inference_steps", run.pipeline.family.steps)
    case = next(job.case for job in pending if job.question is None)
    shown = case.pictures if case.references else case.image
    times = []
    for count in (2, 2, 4):  # the first one warms up
        with _timed() as taken:
            run.pipeline.edit(shown, case.prompt, 0, **{**run.options, "num_inference_steps": count})
        times.append(taken[0])
    step = max(times[2] - times[1], 0.0) / 2
    each = times[1] + step * (steps - 2)
    minutes = each * edits / processes / 60
    amount = (
        f"{minutes / 60:.1f} h"
        if minutes >= 90
        else f"{minutes:.0f} min"
        if minutes >= 2
        else f"{60 * minutes:.0f} s"
    )
    return (
        f"{edits} edits and {len(pending) - edits} questions to do: about {amount} for the edits, at "
        f"{each:.1f} s each as two short ones took here. Ctrl-C keeps what is done."
    )
