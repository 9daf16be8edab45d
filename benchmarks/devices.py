"""Benchmarks over several devices: a folder's features and an evaluation, on one and on two."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .runner import Bench

ROOT = Path(__file__).parents[1]
RATE = re.compile(r"([\d.]+) images/s")
TOOK = re.compile(r"Took ([\d.]+) s")


def stream(bench: Bench) -> None:
    """Extract the features of a folder of images on one device."""
    _extraction(bench, _folder(bench), 1)


def devices(bench: Bench) -> None:
    """Extract the same folder, and evaluate the miniature, on one device and on two."""
    if bench.cuda and torch.cuda.device_count() < 2:
        print("  this part needs two devices and found one: nothing is measured")
        return
    folder, bar = _folder(bench), ">= 1.8" if bench.cuda else ""
    rates = {count: _extraction(bench, folder, count) for count in (1, 2)}
    bench.add("features of a folder, two devices over one", rates[2] / rates[1], "times", bar)
    seconds = {count: _evaluation(bench, count) for count in (1, 2)}
    bench.add("evaluation of the miniature, two devices over one", seconds[1] / seconds[2], "times", bar)


def _folder(bench: Bench) -> Path:
    """Synthetic images as PNG files, written once."""
    from qwen_vision_bridge.synthetic.cases import sample_image

    place = bench.settings.folder / f"images-{bench.settings.images}"
    if not (place / "all").is_file():
        if place.exists():
            raise FileExistsError(f"{place} is not this benchmark's: move it away, or give another --folder")
        folder = _new_folder(bench, "images")
        image = sample_image(bench.load_family().image_size)
        for number in range(min(32, bench.settings.images)):
            image.rotate(11 * number).save(folder / f"{number:06d}.png")
        for number in range(32, bench.settings.images):  # copies: features are computed for every file
            shutil.copyfile(folder / f"{number % 32:06d}.png", folder / f"{number:06d}.png")
        (folder / "all").touch()
        os.rename(folder, place)
    return place


def _new_folder(bench: Bench, name: str) -> Path:
    """Create an empty folder below the user's for this run alone."""
    bench.settings.folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=bench.settings.folder))


def _extraction(bench: Bench, images: Path, count: int) -> float:
    """Images per second from files to shards, as the command prints it."""
    family, output = bench.load_family(), _new_folder(bench, "features")
    roles = ["--source", family.source.repo, "--target", family.target.repo]
    folders = ["--folder", str(images), "--output", str(output)]
    script = ["example_extraction.py", "--models", bench.settings.family, *roles, *folders]
    rate = float(RATE.findall(_launch(script, count, bench))[-1])
    bench.add(f"features of {bench.settings.images} files to shards, {_named(count)}", rate, "images/s")
    shutil.rmtree(output, ignore_errors=True)
    return rate


def _evaluation(bench: Bench, count: int) -> float:
    """Seconds of an evaluation of the miniature, from its first case to its results."""
    output = _new_folder(bench, "evaluation")
    options = ["--models", "miniature", "--example", "3", "--bridge", "random"]
    options += ["--cases", str(bench.settings.cases), "--output", str(output)]
    script = ["example_end_to_end.py", *options]
    seconds = float(TOOK.findall(_launch(script, count, bench))[-1])
    shutil.rmtree(output, ignore_errors=True)
    bench.add(f"evaluation of the miniature, {bench.settings.cases} cases, {_named(count)}", seconds, "s")
    return seconds


def _named(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"


def _launch(script: list[str], count: int, bench: Bench) -> str:
    """Run a script of this project in one process, or in several through accelerate; return its output.

    Raises:
        OSError: the script failed; its last lines are in the message.
    """
    command = [sys.executable, str(ROOT / script[0]), *script[1:]]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    home = bench.settings.folder / f"home-{time.time_ns()}"  # no features and baselines of another run
    environment = {**os.environ, "PYTHONPATH": paths, "QWEN_VISION_BRIDGE_HOME": str(home)}
    if bench.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        launcher += ["--main_process_port", "0"]
        command = [sys.executable, *launcher, *command[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise OSError(f"{script[0]} ended with {done.returncode}: {last}")
    return done.stdout
