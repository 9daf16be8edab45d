"""Arms × cases → records: the same edits and questions in every arm, measured and on disk as they come.

A run that was stopped goes on where it was; one that is finished does nothing. Under `accelerate launch` the
cases are dealt out to the processes, and their records are one result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..case import GROUPS, OTHER, Case
from ..distributed import Processes
from ..io import duration
from ..pipeline import EnhancedQwenImageEdit
from ..specs import check_seed
from .arms import Arm, check_arms, default_arms, loading_loras
from .executor import Executor
from .metrics.consistency import pair_records
from .metrics.registry import METRICS
from .record_log import RecordLog
from .scoring import scoring_pool, unmeasured
from .statistics import Difference, compare_arms
from .tasks import Run, Task, check_ids, plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """How a run is done; none of this changes what is compared.

    Raises:
        ValueError: fewer workers than 0.
    """

    batch_arms: int = 1
    """Edits that are denoised together, arms and cases of equal size; above 1 the images are close to those
    of 1 and not the same bits, so their records are known by other keys."""
    workers: int = 0
    """Processes that measure images beside the one that edits; 0 measures in this one."""
    edits: bool = True
    """Whether cases are edited; otherwise the language model alone is asked."""
    retry_errors: bool = False
    """Do again what an earlier run of the folder recorded as an error."""
    notes: Sequence[str] = ()
    """What the cases leave out, in words, for the report."""
    announce: Callable[[str], None] | None = None
    """Takes the time that the run is estimated to need, in a sentence, before it starts."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; needed: at least 0")


class Evaluation(NamedTuple):
    """The result of a run."""

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
    cases: Sequence[Case],
    folder: str | Path,
    arms: Sequence[Arm] | None = None,
    seed: int = 0,
    *,
    strength: float = 1.0,
    perception: bool = True,
    options: EvaluationOptions | None = None,
    **edit_options: Any,
) -> Evaluation | None:
    """Run every case in every arm, as an edit and in questions, and compare each arm with the baseline.

    Writes images and `results.jsonl` into the folder; `report.tables.write_results` writes the rest. A case
    that fails is recorded with its error and the others go on.

    Args:
        cases: of `make_cases`, `language_cases` or `load_cases`, each with an id of its own.
        arms: None is the pipeline's bridge at `strength`, the baseline and both controls.
        seed: of noise, shuffling and bootstrap, see `check_seed`.
        perception: whether the target's language model is asked too.
        options: how the run is done.
        edit_options: of the edits, as `EnhancedQwenImageEdit.generate` takes them.

    Returns:
        None in processes other than the first.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: no cases, a seed out of range, ids that are not unique, arms that cannot be compared.
        OSError: the folder cannot be written to.
    """
    started = time.perf_counter()
    check_seed(seed)
    options = options or EvaluationOptions()
    arms = arms or default_arms(pipeline.bridge, pipeline.bridge_name, strength, pipeline.options.site)
    check_arms(arms)
    check_ids(cases)
    processes = Processes()
    by_id = {case.case_id: case for case in cases}
    run = Run(pipeline, Path(folder), arms, seed, edit_options, by_id, options.batch_arms)
    tasks, left_out = plan(run, options.edits, perception)
    record_log = RecordLog(run.folder, processes.index)
    processes.wait()  # no process writes before all have read
    known = {
        key for key, record in record_log.records.items() if not (options.retry_errors and record["error"])
    }
    pending = [task for task in tasks if task.key not in known]
    if options.announce is not None and processes.is_main:
        options.announce(_estimate(run, pending, processes.count))
    mine = processes.share(sorted({task.case.case_id for task in pending}))
    with (
        processes.working_in(run.folder) if pending else nullcontext(),
        loading_loras(pipeline, arms if pending else ()),
    ):
        _work(run, mine, pending, record_log, options.workers)
        processes.wait()
    if not processes.is_main:
        return None
    record_log.merge()
    records = [record_log.records[task.key] for task in tasks]
    records += pair_records(cases, records, run.folder)
    failures = [f"{r['case_id']}, {r['arm']}: {r['error']}" for r in records if r["error"]]
    left_out = [*options.notes, *unmeasured(cases), *left_out, *failures]
    rows = compare_arms(records, METRICS, (*GROUPS, OTHER), seed)
    seconds, before = time.perf_counter() - started, len(tasks) - len(pending)
    described = [arm.describe() for arm in arms]
    return Evaluation(rows, records, left_out, pipeline.provenance([seed]), described, seconds, before)


def _work(
    run: Run, mine: Sequence[str], pending: Sequence[Task], record_log: RecordLog, workers: int
) -> None:
    """Do the pending tasks of some cases, one case after the other with all its arms."""
    from tqdm import tqdm

    by_case: dict[str, list[Task]] = {case_id: [] for case_id in mine}
    for task in pending:
        if task.case.case_id in by_case:
            by_case[task.case.case_id].append(task)
    _extract(run, mine)
    total = sum(map(len, by_case.values()))
    bar = tqdm(total=total, desc="evaluating", unit="task", disable=total == 0)
    with bar, scoring_pool(workers) as pool:
        executor = Executor(run, record_log, pool, 4 * workers, bar.update)
        try:
            for tasks in _chunks(list(by_case.values()), run.batch):
                executor.work(tasks)
        finally:  # finished images are kept, after Ctrl-C too
            executor.finish()


def _sizes(tasks: Sequence[Task]) -> list[tuple[int, int]]:
    return [image.size for image in tasks[0].case.images]


def _chunks(by_case: Sequence[list[Task]], batch: int) -> Iterator[list[Task]]:
    """Tasks of whole cases: as many cases of equal sizes at a time as have their edits in one batch."""
    chunk: list[Task] = []
    for tasks in sorted(by_case, key=_sizes) if batch > 1 else by_case:
        edits = sum(task.question is None for task in [*chunk, *tasks])
        if chunk and (edits > batch or _sizes(tasks) != _sizes(chunk)):
            yield chunk
            chunk = []
        chunk = chunk + tasks
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


def _estimate(run: Run, pending: Sequence[Task], processes: int) -> str:
    """How long the pending tasks will take, from short baseline edits of the first case."""
    edits = sum(task.question is None for task in pending)
    if not edits:
        return f"{len(pending)} questions and no edits are left to do."
    steps = run.options.get("num_inference_steps", run.pipeline.family.steps)
    case = next(task.case for task in pending if task.question is None)
    together = min(run.batch, edits)
    try:
        times = [_short_edit(run, case, count, together) for count in (2, 2, 4)]  # the first one warms up
    except Exception as error:  # comes again, and is recorded, when the case runs
        logger.debug("%s: %s", case.case_id, error)
        return f"{edits} edits to do; how long they take is not known, since {case.case_id} fails."
    step = max(times[2] - times[1], 0.0) / 2
    each = times[1] + step * (steps - 2)
    amount = duration(each * edits / processes)
    return (
        f"{edits} edits and {len(pending) - edits} questions to do: about {amount} for the edits, at "
        f"{each:.1f} s each as short ones took here. Ctrl-C keeps what is done."
    )


def _short_edit(run: Run, case: Case, steps: int, together: int) -> float:
    """Seconds an edit of so many steps takes, alone or as its share of a batch."""
    options = {**run.options, "num_inference_steps": steps}
    started = time.perf_counter()
    if run.batch == 1:
        run.pipeline.edit(run.pipeline.check_edit(case.shown, case.prompt, **options))
        return time.perf_counter() - started
    edit = run.pipeline.prepare(run.pipeline.check_edit(case.shown, case.prompt, **options))
    prepared = time.perf_counter() - started
    run.pipeline.denoise([edit] * together)
    return prepared + (time.perf_counter() - started - prepared) / together
