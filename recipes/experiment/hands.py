"""Jobs done here one after the other, or by several processes that each have a bench of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from bench import Bench

Found = TypeVar("Found")

_bench: Bench | None = None


class Hands:
    """What does an experiment's jobs.

    Args:
        make: a bench; it is called once in every process. count: processes; 0 is this one.
    """

    def __init__(self, make: Callable[[], Bench], count: int = 0) -> None:
        self.count, self._make, self._pool = count, make, None
        if count:
            # Forked processes would share the CUDA context of this one.
            fresh = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, fresh, initializer=_open, initargs=(make,))

    def do(self, job: Callable[..., Found], given: Sequence[tuple[Any, ...]]) -> list[Found]:
        """What `job(bench, *arguments)` gives for each of the given arguments, in their order.

        Raises:
            Whatever the first job to fail raises; jobs that have not begun are then left.
        """
        if self._pool is None:
            if _bench is None:
                _open(self._make)
            return [job(_bench, *arguments) for arguments in given]
        waiting = [self._pool.submit(_call, job, arguments) for arguments in given]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [done.result() for done in waiting]

    def __enter__(self) -> Hands:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _open(make: Callable[[], Bench]) -> None:
    global _bench
    _bench = make()


def _call(job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return job(_bench, *arguments)
