"""The processes of one run, one or as many as `accelerate launch` started, and other runs in their folder."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from .io import read_json, write_text

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
CLOCK_SHIFT = 5.0  # seconds by which setting the clock may move a process's start
LONGEST_WAIT = timedelta(days=7)  # for the slowest process; torch's own limit is minutes


class Processes:
    """This process and its peers; without `accelerate launch` it is the only one."""

    def __init__(self) -> None:
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
            self._state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._state is None else self._state.process_index

    @property
    def count(self) -> int:
        """Number of processes."""
        return 1 if self._state is None else self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the result."""
        return self.index == 0

    @property
    def device(self) -> str | None:
        """The device that accelerate assigned to this process; None where it is the only one."""
        return None if self._state is None else str(self._state.device)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of the items, dealt out in turn."""
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Wait until every process has arrived here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextmanager
    def working_in(self, folder: str | Path) -> Iterator[None]:
        """Warn where another run works in a folder, and let others see this one; for the `with` block.

        The first process alone looks and leaves `.working-<host>-<pid>.json`; a file whose process is dead is
        removed. Two runs in a folder harm nothing, but both do what neither has finished.
        """
        if not self.is_main:
            yield
            return
        folder, started = Path(folder), _start_of(os.getpid())
        for host, pid in _others(folder):
            place = f"process {pid}" if host == _host() else f"process {pid} on {host} (if it still runs)"
            logger.warning("%s works in %s too: what is not finished there is done twice", place, folder)
        own = folder / f".working-{_host()}-{os.getpid()}.json"
        with suppress(OSError):  # a folder that cannot be written to is reported by what is written next
            write_text(own, json.dumps({"started": started}) + "\n")
        try:
            yield
        finally:
            own.unlink(missing_ok=True)


def _others(folder: Path) -> list[tuple[str, int]]:
    """(host, pid) of other live processes that say they work in a folder; files of dead ones are removed.

    Whether a process of another host lives cannot be seen from here.
    """
    others = []
    for path in sorted(folder.glob(".working-*.json")):
        if (named := re.fullmatch(r"\.working-(.+)-(\d+)\.json", path.name)) is None:
            continue
        host, pid = named[1], int(named[2])
        if host == _host() and pid == os.getpid():
            continue
        try:
            started = read_json(path)["started"]
        except (OSError, ValueError, KeyError):  # just removed, or of another program
            continue
        now = _start_of(pid)
        if host != _host() or (now is not None and abs(now - float(started)) < CLOCK_SHIFT):
            others.append((host, pid))
        else:  # dead, or its number is another's now
            path.unlink(missing_ok=True)
    return others


def _host() -> str:
    """This machine's name, as a part of a file name."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "unknown"


def _start_of(pid: int) -> float | None:
    """When a process started, in seconds since 1970; None where there is none of that number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
