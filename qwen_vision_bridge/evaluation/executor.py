"""Tasks → records: images edited alone or together, questions asked, everything measured and written."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..batching import Prepared
from ..cache import VisionCache
from ..case import Case
from ..controls import target_levels
from ..images import load_images
from ..injection import Levels
from ..io import write_image
from ..pairs import Edit
from ..patches import shared_latents
from ..specs import cache_home
from ..synthetic.questions import Question
from .record_log import RecordLog
from .scoring import score, score_reply
from .statistics import BASELINE
from .tasks import Run, Task, content_key
from .vqa import ask

if TYPE_CHECKING:
    from ..injection import LevelAttention

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class PendingScore(NamedTuple):
    """An image that is on disk and being measured."""

    task: Task
    fields: dict[str, Any]
    """Of its record, so far."""
    seconds: float
    scored: Future[dict[str, Any]]


class Executor:
    """Does tasks and writes their records.

    Args:
        run: what stays the same.
        record_log: takes the records.
        pool: measures images, here or in processes of its own.
        most_pending: images that may wait to be measured.
        tick: is called for every record.
    """

    def __init__(
        self, run: Run, record_log: RecordLog, pool: Pool, most_pending: int, tick: Callable[[], Any]
    ) -> None:
        self.run, self.record_log, self.tick = run, record_log, tick
        self.pool, self.most_pending = pool, most_pending
        self._sources: dict[str, VisionCache] = {}
        self._pending: deque[PendingScore] = deque()

    def work(self, tasks: Sequence[Task]) -> None:
        """Do the tasks of some cases; one that fails is a record with an error, and the others go on."""
        for case in {task.case.case_id: task.case for task in tasks}.values():
            self._write_inputs(case)
        with shared_latents(self.run.pipeline.pipe):
            for task in tasks:
                if task.question is not None:
                    self._answer(task, task.question)
            self._edit([task for task in tasks if task.question is None])
        self._sources.clear()

    def finish(self, at_most: int = 0) -> None:
        """Write the records of measured images, until at most so many are still being measured."""
        while self._pending and (len(self._pending) > at_most or self._pending[0].scored.done()):
            pending = self._pending.popleft()
            with self._recording_errors([pending.task]):
                self._record(pending.task, {**pending.fields, **pending.scored.result()}, pending.seconds)

    @contextmanager
    def _recording_errors(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Record an error inside the `with` for each of the tasks, and go on after it."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:  # one bad case must not end a run of hours; it is in the results
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for task in tasks:
                logger.warning("%s, %s: %s", task.case.case_id, task.arm.name, error)
                seconds = time.perf_counter() - started
                self._record(task, {"metrics": {}, "error": message}, seconds)

    def _record(self, task: Task, fields: dict[str, Any], seconds: float) -> None:
        case, question = task.case, task.question
        record: dict[str, Any] = {
            "error": None,
            "key": task.key,
            "level": task.level,
            "case_id": case.case_id if question is None else f"{case.case_id}:{question.kind}",
            "group": case.group,
            "kind": case.kind,
            "difficulty": case.difficulty,
            "arm": task.arm.name,
            "prompt": case.prompt if question is None else question.text,
            "seed": self.run.seed_of(case),
            **fields,
            "seconds": round(seconds, 3),
        }
        self.record_log.append(record)
        self.tick()

    # --- edits -------------------------------------------------------------------------------------------

    def _edit(self, tasks: Sequence[Task]) -> None:
        """Edits by the stock call, or prepared one by one and denoised in batches of equal sizes."""
        batches: dict[tuple[Any, ...], list[tuple[Task, Prepared]]] = {}
        for task in tasks:
            started = time.perf_counter()
            with self._recording_errors([task]):
                path = self._baseline_path(task)
                if path is not None and path.is_file():  # an earlier run left it
                    image, attention = load_images(path)[0], None
                elif self.run.batch == 1:
                    image, attention = self._run(task, self.run.pipeline.edit)
                else:
                    prepared = self._run(task, self.run.pipeline.prepare)
                    batches.setdefault((*prepared.shape, task.arm.loras), []).append((task, prepared))
                    continue
                self._save(task, image, attention, time.perf_counter() - started)
        for edits in batches.values():
            for first in range(0, len(edits), self.run.batch):
                self._denoise(edits[first : first + self.run.batch])

    def _denoise(self, edits: Sequence[tuple[Task, Prepared]]) -> None:
        started = time.perf_counter()
        images: list[Image.Image] = []
        loras = edits[0][0].arm.with_loras(self.run.pipeline)  # one batch has one arm's
        with self._recording_errors([task for task, _ in edits]), loras:
            images = self.run.pipeline.denoise([prepared for _, prepared in edits])
        seconds = (time.perf_counter() - started) / len(edits)
        for (task, prepared), image in zip(edits, images, strict=False):  # none where it failed
            with self._recording_errors([task]):
                self._save(task, image, prepared.attention, seconds)

    def _run(self, task: Task, function: Callable[[Edit], Result]) -> Result:
        """Run `edit` or `prepare` of the pipeline with the task's case and arm."""
        case, arm, run = task.case, task.arm, self.run
        edit = run.pipeline.check_edit(
            case.shown, case.prompt, run.seed_of(case), arm.strength, **run.options
        )
        edit = replace(edit, bridge=arm.bridge, source=self._source(task), site=arm.site)
        with arm.applied(run.pipeline, case):
            return function(edit)

    def _baseline_path(self, task: Task) -> Path | None:
        """Where a baseline's image is kept for other runs; None for other arms."""
        if not task.arm.is_baseline:
            return None
        key = content_key(self.run, task.case, task.arm, self.run.batch > 1)
        return cache_home() / "baselines" / f"{key}.png"

    def _save(self, task: Task, image: Image.Image, attention: LevelAttention | None, seconds: float) -> None:
        """Write an image with its level weights, and have it measured; keep a baseline for other runs."""
        case, baseline = task.case, self._baseline_path(task)
        if baseline is not None and not baseline.is_file():
            write_image(baseline, image, self._about(case, task.arm.name))
        if image.size != case.image.size:  # the editor works at its own size
            image = image.resize(case.image.size)
        # Another bridge's image of the same case keeps its own name.
        stem = f"{case.group}/{case.case_id}_{task.arm.name}-{task.key[:6]}"
        about = self._about(case, task.arm.name)
        write_image(self.run.folder / f"{stem}.png", image, about)
        fields: dict[str, Any] = {"image": f"{stem}.png"}
        if attention is not None:
            weights = attention.maps()[-1]  # of the image that is edited, (gh, gw, L)
            shares = np.clip(np.rint(weights[..., :3] * 255), 0, 255).astype(np.uint8)
            if shares.shape[-1] == 3:
                write_image(self.run.folder / f"{stem}_levels.png", Image.fromarray(shares), about)
                fields["attention"] = f"{stem}_levels.png"
            means = weights.reshape(-1, weights.shape[-1]).mean(0).tolist()
            fields["level_weights"] = dict(zip(attention.levels, means, strict=True))
        self._pending.append(PendingScore(task, fields, seconds, self.pool.submit(score, case, image)))
        self.finish(self.most_pending)

    # --- questions ---------------------------------------------------------------------------------------

    def _answer(self, task: Task, question: Question) -> None:
        """One question about the last image of a case."""
        started = time.perf_counter()
        with self._recording_errors([task]):
            source = self._source(task)
            if isinstance(source, VisionCache):
                source = source.split()[-1]
            with task.arm.applied(self.run.pipeline, task.case):
                reply = ask(self.run.pipeline, task.case.image, question, task.arm, source)
            fields = {"reply": reply, "answer": question.answer, "metrics": score_reply(question, reply)}
            self._record(task, fields, time.perf_counter() - started)

    def _source(self, task: Task) -> VisionCache | Levels | None:
        """What the arm's bridge sees in place of, or as, the source's levels."""
        if task.arm.bridge is None:
            return None
        if task.arm.features == "target":
            return target_levels(task.arm.bridge.config)
        case_id: str | None = task.case.case_id
        if task.arm.features == "shuffled":
            case_id = self.run.partners[task.case.case_id]
        if case_id is None:
            raise ValueError(f"{task.case.case_id}: no other case has its grid and other images")
        if case_id not in self._sources:
            self._sources[case_id] = self.run.pipeline.extract_source(self.run.cases[case_id].images)
        return self._sources[case_id]

    def _write_inputs(self, case: Case) -> None:
        images = {f"reference{number}": image for number, image in enumerate(case.references, start=1)}
        images["input"] = case.image
        if case.target is not None:
            images["target"] = case.target
        for name, image in images.items():
            path = self.run.folder / case.group / f"{case.case_id}_{name}.png"
            write_image(path, image, self._about(case, name))

    def _about(self, case: Case, arm: str) -> dict[str, Any]:
        """What an image's file says of it, beside the command; short, since a run has thousands."""
        family = self.run.pipeline.family
        models = [family.editor.name, *([] if arm == BASELINE else [family.source.name])]
        return {"case": case.case_id, "arm": arm, "seed": self.run.seed_of(case), "models": models}
