"""Jobs that need one another, done here one by one or by several processes, each with a bench of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

from .bench import Bench

_bench: Bench | None = None  # of a process that does jobs for another


@dataclass(frozen=True)
class Job:
    """One call `do(bench, *given)`.

    Args:
        needs: names of the jobs that have to be done before it.
    """

    do: Callable[..., Any]
    given: tuple[Any, ...] = ()
    needs: tuple[Hashable, ...] = ()


class Hands:
    """What does an experiment's jobs.

    Args:
        make: a bench; it is called once in every process. count: processes; 0 is this one.
    """

    def __init__(self, make: Callable[[], Bench], count: int = 0) -> None:
        self.count, self._make, self._pool = count, make, None
        self._bench: Bench | None = None
        if count:
            # Forked processes would share the CUDA context of this one.
            fresh = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, fresh, initializer=_open, initargs=(make,))

    def do(self, jobs: Mapping[Hashable, Job]) -> dict[Hashable, Any]:
        """What each job gives, by name; of those that may begin, the ones that stand first do.

        Raises:
            KeyError: a job needs one that is not there.
            Whatever the first job to fail raises; jobs that have not begun are then left.
        """
        for job in jobs.values():
            for name in job.needs:
                if name not in jobs:
                    raise KeyError(f"a job needs {name!r}, which is none of the jobs")
        return self._here(jobs) if self._pool is None else self._there(jobs)

    def _here(self, jobs: Mapping[Hashable, Job]) -> dict[Hashable, Any]:
        if self._bench is None:
            self._bench = self._make()
        found: dict[Hashable, Any] = {}
        left = dict(jobs)
        while left:
            name = next(_ready(left, found))
            job = left.pop(name)
            found[name] = job.do(self._bench, *job.given)
        return found

    def _there(self, jobs: Mapping[Hashable, Job]) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        left, running = dict(jobs), dict[Future[Any], Hashable]()
        try:
            while left or running:
                for name in list(_ready(left, found)):
                    if len(running) >= self.count:  # what becomes ready later may stand before the rest
                        break
                    running[self._pool.submit(_call, left.pop(name))] = name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    found[running.pop(future)] = future.result()
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        return found

    def __enter__(self) -> Hands:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bench is not None:
            self._bench.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _ready(left: Mapping[Hashable, Job], found: Mapping[Hashable, Any]) -> Iterable[Hashable]:
    return (name for name, job in left.items() if all(need in found for need in job.needs))


def _open(make: Callable[[], Bench]) -> None:
    global _bench
    _bench = make()
    # A process waits for its children before it ends, so they are told that nothing more comes, and before
    # their queues are closed, which has priority 10.
    util.Finalize(None, _bench.close, exitpriority=100)


def _call(job: Job) -> Any:
    return job.do(_bench, *job.given)
