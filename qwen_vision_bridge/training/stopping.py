"""Stopping long work when it is asked to: with what is done kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that names the first SIGINT or SIGTERM; a second one acts as it would without this."""
    asked: list[str] = []

    def ask(number: int, _frame: object) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():  # which alone can take signals
        yield asked
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
