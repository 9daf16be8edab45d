"""The processes of one run: one, or as many as `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
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
