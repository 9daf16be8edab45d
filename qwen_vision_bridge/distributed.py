"""The processes of one run: alone, or as many as `accelerate launch` started."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
logger = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(days=7)  # for the slowest process; torch's own limit is minutes


class Processes:
    """Who this process is among the others; without `accelerate launch` it is the only one."""

    def __init__(self) -> None:
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
            self._state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
        else:
            _say_if_alone()

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._state is None else self._state.process_index

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self._state is None else self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the result."""
        return self.index == 0

    @property
    def device(self) -> str | None:
        """The device that accelerate gave to this process; None where it is alone."""
        return None if self._state is None else str(self._state.device)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that fall to this process, dealt out in turn."""
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()


@cache
def _say_if_alone() -> None:
    """Warn, once, where `accelerate launch` was asked for more processes than this one."""
    if (asked := _asked_of_accelerate()) > 1:
        logger.warning(
            "accelerate was asked for %d processes and started one, as it does without --multi_gpu", asked
        )


def _asked_of_accelerate() -> int:
    """How many processes the `accelerate launch` above this one was asked for; 1 where there is none."""
    import psutil

    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:  # gone, or another user's: then it is not known
        return 1
    if not any("accelerate" in word for word in words[:3]):
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes") and (value or following).isdecimal():
            return int(value or following)
    return 1
