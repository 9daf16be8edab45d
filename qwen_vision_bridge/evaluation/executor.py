"""Jobs → records: images made alone or together, questions asked, everything measured and written."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..batching import Prepared
from ..cache import VisionCache
from ..edit import Edit
from ..images import load_images
from ..injection import LevelAttention
from ..io import write_image
from ..patches import shared_latents
from ..specs import cache_home
from .arms import target_levels
from .record_log import RecordLog
from .scoring import Scorer
from .tasks import Job, Run, content_key
from .vqa import ask, score

logger = logging.getLogger(__name__)

Edited = tuple[Image.Image, LevelAttention | None]


class PendingScore(NamedTuple):
    """An image that is on disk and being measured."""

    job: Job
    found: dict[str, Any]
    seconds: float
    measured: Future[dict[str, Any]]


class Executor:
    """Does jobs and writes their records.

    Args:
        run: what stays the same.
        record_log: takes the records.
        scorer: measures images, here or in processes of its own.
        tick: is called for every record.
    """

    def __init__(self, run: Run, record_log: RecordLog, scorer: Scorer, tick: Callable[[], Any]) -> None:
        self.run, self.record_log, self.scorer, self.tick = run, record_log, scorer, tick
        self._sources: dict[str, VisionCache] = {}
        self._waiting: deque[PendingScore] = deque()

    def work(self, jobs: Sequence[Job]) -> None:
        """Do the jobs of some cases; a job that fails is a record with an error, and the others go on."""
        for case in {job.case.case_id: job.case for job in jobs}.values():
            self._write_inputs(case)
        with shared_latents(self.run.pipeline.pipe):
            for job in jobs:
                if job.question is not None:
                    self._try([job], lambda job=job: self._record(job, self._ask(job)))
                elif self.run.batch == 1:
                    self._try([job], lambda job=job: self._keep(job, self._edit(job)))
            if self.run.batch > 1:
                self._together([job for job in jobs if job.question is None])
        self._sources.clear()

    def finish(self, at_most: int = 0) -> None:
        """Write the records of measured images, until at most so many are still being measured."""
        while self._waiting and (len(self._waiting) > at_most or self._waiting[0].measured.done()):
            waiting = self._waiting.popleft()
            self._try(
                [waiting.job],
                lambda waiting=waiting: self._record(
                    waiting.job, {**waiting.found, **waiting.measured.result()}, waiting.seconds
                ),
            )

    def _try(self, jobs: Sequence[Job], do: Callable[[], Any]) -> Any:
        """Do something for jobs; where it fails they are recorded with the error, and None is returned."""
        self._started = time.perf_counter()
        try:
            return do()
        except Exception as error:  # one bad case must not end a run of hours; it is in the results
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for job in jobs:
                logger.warning("%s, %s: %s", job.case.case_id, job.arm.name, error)
                self._record(job, {"metrics": {}, "error": words})
        return None

    def _record(self, job: Job, found: dict[str, Any], seconds: float | None = None) -> None:
        case, question = job.case, job.question
        seconds = time.perf_counter() - self._started if seconds is None else seconds
        record: dict[str, Any] = {
            "error": None,
            "key": job.key,
            "level": job.level,
            "case_id": case.case_id if question is None else f"{case.case_id}:{question.kind}",
            "group": case.group,
            "kind": case.kind,
            "difficulty": case.difficulty,
            "arm": job.arm.name,
            "prompt": case.prompt if question is None else question.text,
            "seed": self.run.seed_of(case),
            **found,
            "seconds": round(seconds, 3),
        }
        self.record_log.append(record)
        self.tick()

    def _edit(self, job: Job) -> Edited:
        """One edit by the stock call."""
        known = self._known(job)
        if known is not None:
            return known, None
        image, attention = self.run.pipeline.edit(self._request(job))
        self._remember(job, image)
        return image, attention

    def _together(self, jobs: Sequence[Job]) -> None:
        """Edits that are prepared one by one and denoised in batches of equal sizes."""
        batches: dict[tuple[Any, ...], list[tuple[Job, Prepared]]] = {}
        for job in jobs:
            known = self._known(job)
            if known is not None:
                self._try([job], lambda job=job, known=known: self._keep(job, (known, None)))
            else:
                made = self._try([job], lambda job=job: self.run.pipeline.prepare(self._request(job)))
                if made is not None:
                    batches.setdefault(made.shape, []).append((job, made))
        for edits in batches.values():
            for first in range(0, len(edits), self.run.batch):
                self._denoise(edits[first : first + self.run.batch])

    def _denoise(self, edits: Sequence[tuple[Job, Prepared]]) -> None:
        started = time.perf_counter()
        jobs = [job for job, _ in edits]
        images = self._try(jobs, lambda: self.run.pipeline.denoise([made for _, made in edits]))
        each = (time.perf_counter() - started) / len(edits)
        for (job, made), image in zip(edits, images or [], strict=False):  # none where it failed
            self._remember(job, image)
            edited = (image, made.attention)
            self._try([job], lambda job=job, edited=edited: self._keep(job, edited, each))

    def _request(self, job: Job) -> Edit:
        """The edit of a job."""
        case, arm, run = job.case, job.arm, self.run
        images = case.images if case.references else case.image  # the first edit pipeline takes one only
        edit = run.pipeline.check_edit(images, case.prompt, run.seed_of(case), arm.strength, **run.options)
        return replace(edit, bridge=arm.bridge, source=self._source(job), site=arm.site)

    def _known(self, job: Job) -> Image.Image | None:
        """The baseline's image where an earlier run made it."""
        kept = self._kept(job)
        return load_images(kept)[0] if kept is not None and kept.is_file() else None

    def _remember(self, job: Job, image: Image.Image) -> None:
        if (kept := self._kept(job)) is not None:
            write_image(kept, image)

    def _kept(self, job: Job) -> Path | None:
        """Where a baseline's image is kept for other runs; None for other arms."""
        if job.arm.bridge is not None:
            return None
        key = content_key(self.run, job.case, job.arm, self.run.batch > 1)
        return cache_home() / "baselines" / f"{key}.png"

    def _keep(self, job: Job, edited: Edited, seconds: float | None = None) -> None:
        """Write an image with its level weights, and have it measured."""
        case, (image, attention) = job.case, edited
        if image.size != case.image.size:  # the editor works at its own size
            image = image.resize(case.image.size)
        # Another bridge's image of the same case keeps its own name.
        stem = f"{case.group}/{case.case_id}_{job.arm.name}-{job.key[:6]}"
        write_image(self.run.folder / f"{stem}.png", image)
        found: dict[str, Any] = {"image": f"{stem}.png"}
        if attention is not None:
            weights = attention.maps()[-1]  # of the image that is edited, (gh, gw, L)
            shares = np.clip(np.rint(weights[..., :3] * 255), 0, 255).astype(np.uint8)
            if shares.shape[-1] == 3:
                write_image(self.run.folder / f"{stem}_levels.png", Image.fromarray(shares))
                found["attention"] = f"{stem}_levels.png"
            means = weights.reshape(-1, weights.shape[-1]).mean(0).tolist()
            found["level_weights"] = dict(zip(attention.levels, means, strict=True))
        measured = self.scorer.submit(case, image)
        taken = time.perf_counter() - self._started if seconds is None else seconds
        self._waiting.append(PendingScore(job, found, taken, measured))
        self.finish(self.scorer.queue)

    def _ask(self, job: Job) -> dict[str, Any]:
        source = self._source(job)
        if isinstance(source, VisionCache):
            source = source.split()[-1]  # the question is about the last image alone
        reply = ask(self.run.pipeline, job.case.image, job.question, job.arm, source)
        return {"reply": reply, "answer": job.question.answer, "metrics": score(job.question, reply)}

    def _source(self, job: Job) -> Any:
        """What the arm's bridge sees in place of, or as, the source's levels."""
        if job.arm.bridge is None:
            return None
        if job.arm.features == "target":
            return target_levels(job.arm.bridge.config)
        case_id = job.case.case_id if job.arm.features == "own" else self.run.partners[job.case.case_id]
        if case_id not in self._sources:
            self._sources[case_id] = self.run.pipeline.extract_source(self.run.cases[case_id].images)
        return self._sources[case_id]

    def _write_inputs(self, case: Any) -> None:
        shown = [(f"reference{number}", image) for number, image in enumerate(case.references, start=1)]
        shown += [("input", case.image)] + ([("target", case.target)] if case.target is not None else [])
        for name, image in shown:
            write_image(self.run.folder / case.group / f"{case.case_id}_{name}.png", image)
