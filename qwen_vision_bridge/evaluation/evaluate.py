"""Arms × cases → records: the same edits and questions in every arm, measured and on disk as they come.

A run that was stopped goes on where it was; one that is finished does nothing. Under `accelerate launch` the
cases are dealt out to the processes, and what they find is one result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed import Processes
from ..pipeline import EnhancedQwenImageEdit
from ..specs import check_seed
from ..synthetic.cases import GROUPS
from .arms import Arm, check_arms, default_arms
from .executor import Executor
from .folder_dataset import FileCase
from .metrics.consistency import pair_records
from .record_log import RecordLog
from .scoring import METRICS, Scorer, unmeasured
from .statistics import Difference, compare_arms
from .tasks import OTHER, Job, Run, check_ids, failures, plan

logger = logging.getLogger(__name__)


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


def evaluate(
    pipeline: EnhancedQwenImageEdit,
    cases: Sequence[Any],
    folder: str | Path,
    arms: Sequence[Arm] | None = None,
    seed: int = 0,
    *,
    strength: float = 1.0,
    perception: bool = True,
    batch_arms: int = 1,
    workers: int = 0,
    retry_errors: bool = False,
    notes: Sequence[str] = (),
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Evaluation | None:
    """Run every case in every arm, in the image and in questions, and compare each arm with the baseline.

    Writes images and `results.jsonl` into the folder; `summaries.write_results` writes the rest. A case
    that fails is recorded with its error and the others go on.

    Args:
        cases: of `world.make_cases`, `casefiles` or `languages`, each with an id of its own.
        arms: None is the pipeline's bridge at `strength`, the baseline and both controls.
        seed: of noise, shuffling and bootstrap, see `check_seed`.
        perception: whether the target's language model is asked too.
        batch_arms: edits that are denoised together, arms and cases of equal size; above 1 the images are
            close to those of 1 and not the same bits, so their records are known by other keys.
        workers: processes that measure images beside the one that makes them; 0 measures in this one.
        retry_errors: do again what an earlier run of the folder recorded as an error.
        notes: what the cases leave out, in words, for the report.
        announce: takes the time that the run is estimated to need, in a sentence, before it starts.
        options: of the edits, as `EnhancedQwenImageEdit.generate` takes them.

    Returns:
        None in processes other than the first.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: no cases, a seed out of range, ids that are not unique or no file names, arms that
            cannot be compared.
        OSError: the folder cannot be written to.
    """
    started = time.perf_counter()
    check_seed(seed)
    arms = arms or default_arms(pipeline.bridge, pipeline.bridge_name, strength, pipeline.options.site)
    check_arms(arms)
    check_ids(cases)
    processes = Processes()
    by_id = {case.case_id: case for case in cases}
    run = Run(pipeline, Path(folder), arms, seed, dict(options), by_id, batch_arms)
    jobs, left_out = plan(run, perception)
    record_log = RecordLog(run.folder, processes.index)
    processes.wait()  # no process writes before all have read
    known = {key for key, record in record_log.records.items() if not (retry_errors and record["error"])}
    pending = [job for job in jobs if job.key not in known]
    if announce is not None and processes.is_main:
        announce(_estimate(run, pending, processes.count))
    mine = processes.share(sorted({job.case.case_id for job in pending}))
    _work(run, mine, pending, record_log, workers)
    processes.wait()
    if not processes.is_main:
        return None
    record_log.merge()
    records = [record_log.records[job.key] for job in jobs]
    records += pair_records([case for case in cases if isinstance(case, FileCase)], records, run.folder)
    left_out = [*notes, *unmeasured(cases), *left_out, *failures(records)]
    rows = compare_arms(records, METRICS, (*GROUPS, OTHER), seed)
    seconds, before = time.perf_counter() - started, len(jobs) - len(pending)
    described = [arm.describe() for arm in arms]
    return Evaluation(rows, records, left_out, pipeline.provenance([seed]), described, seconds, before)


def _work(run: Run, mine: Sequence[str], pending: Sequence[Job], record_log: RecordLog, workers: int) -> None:
    """Do the pending jobs of some cases, one case after the other with all its arms."""
    from tqdm import tqdm

    by_case: dict[str, list[Job]] = {case_id: [] for case_id in mine}
    for job in pending:
        if job.case.case_id in by_case:
            by_case[job.case.case_id].append(job)
    _extract(run, mine)
    total = sum(map(len, by_case.values()))
    with tqdm(total=total, desc="evaluating", unit="job", disable=total == 0) as bar, Scorer(workers) as m:
        executor = Executor(run, record_log, m, bar.update)
        try:
            for jobs in _chunks(list(by_case.values()), run.batch):
                executor.work(jobs)
        finally:  # what is drawn is kept, after Ctrl-C too
            executor.finish()


def _chunks(by_case: Sequence[list[Job]], batch: int) -> Iterator[list[Job]]:
    """Jobs of whole cases: as many cases of equal sizes at a time as have their edits in one batch."""

    def sizes(jobs: list[Job]) -> list[tuple[int, int]]:
        return [image.size for image in jobs[0].case.images]

    chunk: list[Job] = []
    edits = 0
    for jobs in sorted(by_case, key=sizes) if batch > 1 else by_case:
        own = sum(job.question is None for job in jobs)
        if chunk and (edits + own > batch or sizes(jobs) != sizes(chunk)):
            yield chunk
            chunk, edits = [], 0
        chunk = chunk + jobs
        edits += own
    if chunk:
        yield chunk


def _extract(run: Run, mine: Sequence[str]) -> None:
    """Source features of all cases into the feature cache: the tower is loaded once, and then freed."""
    if all(arm.bridge is None or arm.features == "target" for arm in run.arms):
        return
    from tqdm import tqdm

    wanted = sorted({*mine, *(partner for name in mine if (partner := run.partners.get(name)))})
    with run.pipeline.keeping_source():
        for case_id in tqdm(wanted, desc="source features", unit="case", disable=not wanted, leave=False):
            try:
                run.pipeline.extract_source(run.cases[case_id].images)
            except Exception as error:  # comes again, and is recorded, when the case runs
                logger.debug("%s: %s", case_id, error)


def _estimate(run: Run, pending: Sequence[Job], processes: int) -> str:
    """How long the pending jobs will take, from short baseline edits of the first case."""
    edits = sum(job.question is None for job in pending)
    if not edits:
        return f"{len(pending)} questions and no edits are left to do."
    steps = run.options.get("num_inference_steps", run.pipeline.family.steps)
    case = next(job.case for job in pending if job.question is None)
    together = min(run.batch, edits)
    times = [_short_edit(run, case, count, together) for count in (2, 2, 4)]  # the first one warms up
    step = max(times[2] - times[1], 0.0) / 2
    each = times[1] + step * (steps - 2)
    minutes = each * edits / processes / 60
    amount = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    amount = amount if minutes >= 2 else f"{60 * minutes:.0f} s"
    return (
        f"{edits} edits and {len(pending) - edits} questions to do: about {amount} for the edits, at "
        f"{each:.1f} s each as short ones took here. Ctrl-C keeps what is done."
    )


def _short_edit(run: Run, case: Any, steps: int, together: int) -> float:
    """Seconds an edit of so many steps, made as the run makes them."""
    shown = case.images if case.references else case.image
    options = {**run.options, "num_inference_steps": steps}
    started = time.perf_counter()
    if run.batch == 1:
        run.pipeline.edit(run.pipeline.check_edit(shown, case.prompt, **options))
        return time.perf_counter() - started
    made = run.pipeline.prepare(run.pipeline.check_edit(shown, case.prompt, **options))
    prepared = time.perf_counter() - started
    run.pipeline.denoise([made] * together)
    return prepared + (time.perf_counter() - started - prepared) / together
