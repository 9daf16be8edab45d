"""Score edits and replies: each gets the metrics of the registry whose needs its case meets."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from PIL import Image

from ..case import Case
from ..synthetic.questions import Question
from .metrics import ocr
from .metrics.lpips import WEIGHTS, lpips_missing
from .metrics.registry import EditedImage, Reply, facts_of, is_readable, measured

BENCHMARK_GAPS = {
    "textedit": "TextEdit: its CLIP and aesthetic scores and its judging by a model are not measured; "
    "texts are read by another reader than its own, so the figures are no entry of its leaderboard",
    "pie": "PIE-Bench: its structure distance (DINO) and CLIP similarity need weights that no package ships",
    "gedit": "GEdit-Bench: its judging by GPT-4o is not done; images get the metrics that need no truth",
}
DIGITS = 6  # decimals of a recorded metric


def unmeasured(cases: Sequence[Case]) -> list[str]:
    """Metrics that these cases would get and this machine cannot give, with the reason."""
    lines = []
    if any(case.edit_mask is not None for case in cases):
        lines += [f"LPIPS ({net}): {why}" for net in WEIGHTS if (why := lpips_missing(net))]
    if unread := dict.fromkeys(case.kind for case in cases if not is_readable(case)):
        lines.append(
            f"{', '.join(unread)}: the reader does not know all of their letters, so no edit is judged right "
            "or wrong; the edited region is compared with that of the right edit, and questions are scored"
        )
    known = {case.dataset for case in cases}
    return lines + [words for name, words in BENCHMARK_GAPS.items() if name in known]


def measure(case: Case, image: Image.Image) -> dict[str, float]:
    """Every metric that a case has the truth for, of one edited image.

    Raises:
        ValueError: an image of another size than the case's.
    """
    return score(case, image)["metrics"]


def score(case: Case, image: Image.Image) -> dict[str, Any]:
    """What a record says of an edited image: `metrics`, and what was read where no text is known."""
    edit, facts = EditedImage(case, image), facts_of(case)
    # The number of threads moves the last digits of long sums; a result must not depend on it.
    metrics = {name: round(value, DIGITS) for name, value in measured(edit, facts).items()}
    reading = {"read_before": edit.text_before, "read_after": edit.text} if "unknown text" in facts else {}
    return {"metrics": metrics, **reading}


def score_reply(question: Question, reply: str) -> dict[str, float]:
    """Every metric of a reply to a question of its kind."""
    return measured(Reply(reply, question.answer), frozenset({"question", question.kind}))


class ThisProcess(Executor):
    """Does what is submitted at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:  # raised where the result is asked for, as a pool's is
            done.set_exception(error)
        return done


@contextmanager
def scoring_pool(workers: int) -> Iterator[Executor]:
    """What scores images: this process, or some of their own while this one makes the next image."""
    pool: Executor = ThisProcess()
    if workers:  # forked processes would share the threads and the CUDA context of this one
        fresh = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, fresh, initializer=_prepare_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    ocr.OCR_THREADS = 1  # of many processes each has one core
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # the reader's own, not imported yet
