"""Run several processes for the start-up of one: forked after the imports, with torchrun's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORK = """
import os, signal, socket, sys

def processes(count, *arguments):
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            signal.alarm(200)  # ends it, whatever it waits for
            if count > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run(*arguments)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"{count} processes failed")

"""


def run_forked(imports: str, run: str, calls: str, folder: Path) -> str:
    """Import, define `run`, and call `processes(count, *arguments)`; returns what they printed.

    They differ from a launcher's in one thing: they do not import for themselves. `test_distributed` has the
    launcher.
    """
    script = folder / "forked.py"
    script.write_text(imports + FORK + run + calls, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
