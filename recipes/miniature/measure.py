"""Measure the finished miniature on cases it has never seen, and write the figures of its card.

    python -m recipes.miniature.measure --source weights/source --editor weights/editor --output card.json

Edits go through the stock pipeline, 20 steps, baseline without any bridge. Records are kept beside the card
as they come, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_vision_bridge.evaluation.statistics import bootstrap_interval
from qwen_vision_bridge.io import write_json
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.patches import condition_size
from qwen_vision_bridge.synthetic import cases as world

PARTS = {"vae": "VAE:", "reading": "reading:", "cost": "cost:", "edits": ""}  # how their figures' names begin
EXPLICIT = ("change_text",)
PLACED = (
    "move_left",
    "move_right",
    "move_top",
    "move_bottom",
    "move_centre",
    "move_corner",
    "move_beside",
    "swap",
    "align",
)
PAINTED = ("recolour_object", "remove_object", "recolour_background")


class Job(NamedTuple):
    """One edit to make and judge."""

    group: str
    kind: str
    index: int
    arm: str
    """`asked`; `outright`, with nothing left to see; `strange`, with the next case's vision."""
    split: str
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


def main() -> None:
    """Run what is missing, then write the card."""
    arguments = _arguments()
    parts = {
        "edits": lambda: edits(arguments),
        "reading": lambda: reading_rows(arguments),
        "vae": lambda: vae_rows(arguments),
        "cost": lambda: cost_rows(arguments),
    }
    rows = [row for part in arguments.parts for row in parts[part]()]
    made = {
        "device": device_name(arguments.device),
        "seed": arguments.seed,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    kept = [row for row in kept if part_of(row["name"]) not in arguments.parts]
    write_json(arguments.output, [*kept, *({**made, **row} for row in rows)])
    for row in rows:
        print(
            f"{row['name']:44} {row['value']:7.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}] n {row['n']}"
        )


def part_of(name: str) -> str:
    """Which of PARTS a figure belongs to."""
    return next(part for part, start in PARTS.items() if name.startswith(start))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="folder of the source")
    parser.add_argument("--editor", required=True, help="folder of the whole pipeline")
    parser.add_argument("--output", type=Path, required=True, help="card.json")
    parser.add_argument("--cases", type=int, default=512, help="at least so many a group")
    parser.add_argument("--rarely", type=int, default=4, help="rounds from one with all arms to the next")
    parser.add_argument("--groups", nargs="+", choices=world.GROUPS, default=list(world.GROUPS))
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure; the card keeps its other figures: new weights want a new card",
    )
    parser.add_argument("--as-is", action="store_true", help="make no edit: figures of those that are there")
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=1, help="of the cases")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, help="guidance; default: the family's")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Every edit: all kinds as asked, hard ones also said outright and with strange encoder.

    Kinds in turn, so that a run which was stopped has some of each. The other arms' differences are large and
    take fewer cases to see: they come in every `--rarely`-th round.
    """
    needed = {group: -(-arguments.cases // len(world.KINDS[group])) for group in arguments.groups}  # a kind
    for index in range(max(needed.values())):
        for group in arguments.groups:
            for kind in world.KINDS[group] if index < needed[group] else ():
                with_all = kind in world.HARD[group] and index % arguments.rarely == 0
                for arm in ("asked", "outright", "strange") if with_all else ("asked",):
                    yield Job(group, kind, index, arm, arguments.split, arguments.seed)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All records, those of an earlier run included."""
    from tqdm import tqdm

    log = arguments.output.with_suffix(".records.jsonl")
    done = {row["key"]: row for row in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    wanted = list(jobs(arguments))
    if arguments.as_is:
        return [done[job.key] for job in wanted if job.key in done]
    missing = [job for job in wanted if job.key not in done]
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        log.open("a") as file,
        context.Pool(arguments.workers, _start, (arguments, context.Value("i", 0))) as processes,
    ):
        for row in tqdm(
            processes.imap_unordered(_edit, missing, chunksize=4), total=len(missing), unit="edit"
        ):
            done[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [done[job.key] for job in wanted]


def edits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The card's figures about edits, with the devices that made them."""
    records = run(arguments)
    devices = {"device": "; ".join(sorted({record["device"] for record in records}))}
    return [{**row, **devices} for row in edit_rows(records)]


@lru_cache(maxsize=1)
def _editor(folder: str, device: str) -> Any:
    from qwen_vision_bridge import EnhancedQwenImageEdit

    pipeline = EnhancedQwenImageEdit(
        "miniature", editor=folder, bridge="fresh", device=device, dtype=torch.float32
    )
    pipeline.pipe.set_progress_bar_config(disable=True)
    return pipeline


_settings: dict[str, Any] = {}


def _start(arguments: argparse.Namespace, started: Any) -> None:
    """Make a process ready: on CUDA each has one core, and all GPUs have as many processes."""
    options = {"num_inference_steps": arguments.steps}
    if arguments.scale is not None:
        options["true_cfg_scale"] = arguments.scale
    _settings.update(folder=arguments.editor, device=arguments.device, options=options)
    if arguments.device == "cuda":
        from .look import one_core

        one_core()
        torch.set_num_threads(1)
        with started.get_lock():
            torch.cuda.set_device(started.value % torch.cuda.device_count())
            started.value += 1


def _edit(job: Job) -> dict[str, Any]:
    from contextlib import nullcontext

    from qwen_vision_bridge.evaluation.correctness import judge
    from qwen_vision_bridge.injection import replace_vision

    pipeline = _editor(_settings["folder"], _settings["device"])
    case, other = (
        world.make_cases(job.group, 1, job.seed, split=job.split, kinds=(job.kind,), first=first)[0]
        for first in (job.index, job.index + 1)
    )
    row = {"key": job.key, **job._asdict(), "right": None, "untouched_ssim": None}
    row["device"] = device_name(_settings["device"])
    if job.arm == "outright" and case.outright is None:
        return row
    prompt = case.outright if job.arm == "outright" else case.prompt
    encoder = replace_vision(pipeline.pipe, _seen(pipeline, other)) if job.arm == "strange" else nullcontext()
    with encoder:
        shown = case.images if case.references else case.image
        image = pipeline.generate(shown, prompt, False, seed=job.index, **_settings["options"])
    verdict = judge(case, image)
    return {**row, "right": verdict.right, "reason": verdict.reason, "untouched_ssim": verdict.untouched_ssim}


@torch.no_grad()
def _seen(pipeline: Any, case: world.Case) -> torch.Tensor:
    """The target tower's features of a case's images, as the pipeline would take them."""
    pipe = pipeline.pipe
    width, height = condition_size(type(pipe), pipeline.family.editor, case.image)
    small = [pipe.image_processor.resize(image, height, width) for image in case.images]
    inputs = pipe.processor.image_processor(images=small, return_tensors="pt").to(pipeline.device)
    pixels = inputs["pixel_values"].to(pipe.text_encoder.dtype)
    return pipe.text_encoder.model.visual(pixels, grid_thw=inputs["image_grid_thw"]).pooler_output


def row_of(name: str, values: list[float] | np.ndarray) -> dict[str, Any]:
    """A figure with its 95 % bootstrap interval."""
    low, high = bootstrap_interval(np.asarray(values, dtype=float))
    value = float(np.mean(values))
    return {"name": name, "value": value, "n": len(values), "ci_low": low, "ci_high": high}


def edit_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The card's figures about edits."""

    def right(arm: str, pick: Callable[[dict[str, Any]], bool]) -> list[float]:
        return [float(r["right"]) for r in records if r["arm"] == arm and r["right"] is not None and pick(r)]

    rows = []
    for name, kinds in (
        ("edit: explicit text change, exact", EXPLICIT),
        ("edit: move, swap, align right", PLACED),
        ("edit: recolour, remove right", PAINTED),
    ):
        if values := right("asked", lambda r, kinds=kinds: r["kind"] in kinds):
            rows.append(row_of(name, values))
    if similar := [
        r["untouched_ssim"] for r in records if r["arm"] == "asked" and r["untouched_ssim"] is not None
    ]:
        rows.append(row_of("edit: SSIM of the unedited region", similar))
    for group, kind in dict.fromkeys((r["group"], r["kind"]) for r in records):
        for arm in ("asked", "outright", "strange"):
            if values := right(arm, lambda r, kind=kind: r["kind"] == kind):
                difficulty = "hard" if kind in world.HARD[group] else "easy"
                rows.append(row_of(f"{difficulty} {group}/{kind}: {arm}", values))
    return [*rows, *room_rows(records)]


def room_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Room and listening: paired differences over the hard kinds of a group."""
    rows = []
    for group in dict.fromkeys(r["group"] for r in records):
        by_case: dict[tuple, dict[str, float]] = {}
        for r in records:
            if r["group"] == group and r["right"] is not None and r["kind"] in world.HARD[group]:
                by_case.setdefault((r["kind"], r["index"]), {})[r["arm"]] = float(r["right"])
        for name, first, second in (("room", "outright", "asked"), ("listening", "asked", "strange")):
            if pairs := [
                arms[first] - arms[second] for arms in by_case.values() if {first, second} <= set(arms)
            ]:
                rows.append(row_of(f"{name}: {group}, {first} minus {second}", pairs))
    return rows


def vae_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """How well the VAE gives held-out images back, through stock code."""
    from diffusers import AutoencoderKLQwenImage

    from .data import images
    from .measure_vae import psnr_of

    vae = AutoencoderKLQwenImage.from_pretrained(arguments.editor, subfolder="vae", torch_dtype=torch.float32)
    held_out = torch.from_numpy(images(arguments.split, 0, arguments.cases)).to(arguments.device)
    return [row_of("VAE: PSNR, dB", psnr_of(vae.to(arguments.device), held_out))]


def reading_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Letters of held-out images that source and target read right."""
    from .fast import build
    from .train_vlm import read_letters

    rows = []
    for role, folder in (("source", arguments.source), ("target", f"{arguments.editor}/text_encoder")):
        model = build(role, 0, folder).to(arguments.device)
        rights = read_letters(model, role, arguments.cases, torch.device(arguments.device), arguments.split)
        rows.append(row_of(f"reading: letters right, {role}", [np.mean(word) for word in rights]))
        rows.append(row_of(f"reading: words right, {role}", [float(all(word)) for word in rights]))
    return rows


def cost_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Loading, time and memory of an edit on two threads of this machine's processor."""
    from .cost import named, repeated

    found = repeated(arguments.source, arguments.editor, arguments.steps)
    return [row_of(name, values) for name, values in named(found).items()]


if __name__ == "__main__":
    main()
