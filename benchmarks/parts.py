"""The benchmark's parts in order of value, and the loop that runs them."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from qwen_vision_bridge.io import write_image
from qwen_vision_bridge.loading.memory import free_cuda

from . import calibration as bench_calibration
from . import devices as bench_devices
from . import edits as bench_edits
from . import towers as bench_towers
from .runner import Bench, Settings, table


class Part(NamedTuple):
    """One piece of the benchmark."""

    run: Callable[[Bench], None]
    seconds: float
    """Estimate at the released shapes on one large GPU, to keep to a time budget."""
    alone: bool = False
    """Whether it needs a process of its own: it caps or measures the process's memory, or may crash it."""


PARTS: dict[str, Part] = {
    "extraction": Part(bench_towers.extraction, 100),
    "target-tower": Part(bench_towers.target_tower, 10),
    "source-tower": Part(bench_towers.source_tower, 40),
    "bridge": Part(bench_towers.bridge, 25),
    "expected-output": Part(bench_towers.expected_output, 10),
    "compiled-tower": Part(bench_towers.compiled_tower, 60),
    "eight-bit": Part(bench_towers.eight_bit, 60),
    "edits": Part(bench_edits.edits, 300),
    "few-steps": Part(bench_edits.few_steps, 150),
    **{
        f"mode-{card}": Part(partial(bench_edits.memory_mode, card_gb=card), 75, alone=True)
        for card in sorted(bench_edits.cards(), key=lambda card: (card not in (24, 16), card))
    },
    "stream": Part(bench_devices.stream, 60),
    "devices": Part(bench_devices.devices, 330),
    "miniature-modes": Part(bench_edits.miniature_modes, 60),
    "calibration": Part(bench_calibration.calibration, 240, alone=True),
}


def run_parts(arguments: argparse.Namespace) -> int:
    """Run the selected parts that are not done yet, then print the results.

    Returns:
        1 where a part failed, else 0.

    Raises:
        ValueError: an unknown part.
    """
    names = arguments.parts.split(",") if arguments.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(_settings(arguments), arguments.output, device, arguments.minutes or math.inf)
    failed, skipped = [], []
    for name in names:
        if bench.is_done(name) and not arguments.again:
            continue
        if bench.left() < PARTS[name].seconds and bench.released:
            skipped.append(name)
            continue
        print(f"-- {name}", flush=True)
        began = bench.elapsed()
        if not _run(bench, name, arguments, len(names) > 1):
            failed.append(name)
        print(f"   {name} took {bench.elapsed() - began:.0f} s", flush=True)
    bench = Bench(bench.settings, bench.output, device)  # with the rows of parts that ran elsewhere
    _draw(bench)
    print(f"\n{table(bench.rows, barred=True)}\n{arguments.output}/results.json: {len(bench.rows)} rows")
    for label, parts in (("failed", failed), ("skipped for lack of time, run again", skipped)):
        if parts:
            print(f"{label}: {', '.join(parts)}")
    return 1 if failed else 0


def _run(bench: Bench, name: str, arguments: argparse.Namespace, several: bool) -> bool:
    """Run one part; a failure is printed and the others go on."""
    if PARTS[name].alone and several:
        command = [sys.executable, *_without(sys.argv, "--parts", "--minutes"), "--parts", name]
        if not Path(sys.argv[0]).name.startswith("benchmark"):
            raise ValueError(f"{name} needs a process of its own: run `python benchmark.py --parts {name}`")
        if subprocess.run(command, check=False).returncode:
            return False
        bench.rows = Bench(bench.settings, bench.output, bench.device).rows
        return True
    try:
        PARTS[name].run(bench)
    except Exception as error:  # one part's failure must not cost the others; it is listed at the end
        if arguments.debug:
            traceback.print_exc()
        print(f"  {name} failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
        traceback.clear_frames(error.__traceback__)
        free_cuda()
        return False
    bench.mark_done(name)
    free_cuda()
    return True


def _without(argv: list[str], *options: str) -> list[str]:
    """A command line without some options and their values."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


def _settings(arguments: argparse.Namespace) -> Settings:
    roles: dict[str, str | None] = {r: getattr(arguments, r) for r in ("source", "target", "editor")}
    family = "qwen" if any(roles.values()) or arguments.random_weights else arguments.family
    return Settings(
        family,
        arguments.random_weights,
        arguments.folder,
        **roles,
        tiny=arguments.tiny,
        side=arguments.side,
        steps=arguments.steps,
        repeats=arguments.repeats,
        images=arguments.images,
        cases=arguments.cases,
    )


def _draw(bench: Bench) -> None:
    """Draw the stages of every device that measured them."""
    from .figure import stage_figure

    for device in dict.fromkeys(row["device"] for row in bench.rows):
        rows = [row for row in bench.rows if row["device"] == device and row["name"].startswith("stage, ")]
        if rows:
            name = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
            write_image(bench.output / f"stages-{name}.png", stage_figure(rows, device))
