"""The benchmark's parts in order of value, and how a run goes through them."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen_vision_bridge.io import write_image
from qwen_vision_bridge.loading.memory import free_cuda

from . import devices as bench_devices
from . import edits as bench_edits
from . import towers as bench_towers
from .runner import Bench, Settings, table


class Part(NamedTuple):
    """One piece of the benchmark."""

    run: Callable[[Bench], None]
    seconds: float
    """What it is thought to take at the released shapes on one large GPU, to keep to a time budget."""
    alone: bool = False
    """Whether it runs in a process of its own: it caps memory, or may bring the process down."""


PARTS: dict[str, Part] = {
    "extraction": Part(bench_towers.extraction, 100),
    "target-tower": Part(bench_towers.target_tower, 10),
    "source-tower": Part(bench_towers.source_tower, 40),
    "bridge": Part(bench_towers.bridge, 25),
    "seed-numbers": Part(bench_towers.seed_numbers, 10),
    "compiled-tower": Part(bench_towers.compiled_tower, 60),
    "edits": Part(bench_edits.edits, 300),
    **{
        f"mode-{card}": Part(lambda bench, card=card: bench_edits.memory_mode(bench, card), 75, alone=True)
        for card in sorted(bench_edits.cards(), key=lambda card: (card not in (24, 16), card))
    },
    "stream": Part(bench_devices.stream, 60),
    "devices": Part(bench_devices.devices, 330),
}


def run_parts(arguments: argparse.Namespace) -> int:
    """Do the parts that are asked for and not done yet, then print what was measured.

    Returns:
        1 where a part failed, else 0.

    Raises:
        ValueError: an unknown part.
    """
    names = arguments.parts.split(",") if arguments.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(_settings(arguments), arguments.output, device, arguments.minutes or math.inf)
    failed, left_out = [], []
    for name in names:
        if bench.is_done(name) and not arguments.again:
            continue
        if bench.left() < PARTS[name].seconds and bench.released:
            left_out.append(name)
            continue
        print(f"-- {name}", flush=True)
        began = bench.elapsed()
        if not _done(bench, name, arguments, len(names) > 1):
            failed.append(name)
        print(f"   {name} took {bench.elapsed() - began:.0f} s", flush=True)
    bench = Bench(bench.settings, bench.output, device)  # with the rows of parts that ran elsewhere
    _draw(bench)
    print(f"\n{table(bench.rows, barred=True)}\n{arguments.output}/results.json: {len(bench.rows)} rows")
    for said, which in (("failed", failed), ("not begun for lack of time, run again", left_out)):
        if which:
            print(f"{said}: {', '.join(which)}")
    return 1 if failed else 0


def _done(bench: Bench, name: str, arguments: argparse.Namespace, several: bool) -> bool:
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
    except Exception as error:  # a part that breaks must not cost the others, and is told at the end
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
    own: dict[str, Any] = {role: getattr(arguments, role) for role in ("source", "target", "editor")}
    family = "qwen" if any(own.values()) or arguments.random_weights else arguments.family
    return Settings(
        family,
        arguments.random_weights,
        arguments.folder,
        **own,
        tiny=arguments.tiny,
        side=arguments.side,
        steps=arguments.steps,
        repeats=arguments.repeats,
        images=arguments.images,
        cases=arguments.cases,
    )


def _draw(bench: Bench) -> None:
    """The figure of the stages, where they were measured."""
    from .figure import stage_figure

    for device in dict.fromkeys(row["device"] for row in bench.rows):
        rows = [row for row in bench.rows if row["device"] == device and row["name"].startswith("stage, ")]
        if rows:
            name = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
            write_image(bench.output / f"stages-{name}.png", stage_figure(rows, device))
