"""A quick look at how well the editor edits, by kind: as asked, said outright, and with strange encoder.

    python -m recipes.miniature.look --target runs/target/target --vae runs/vae/vae \\
        --transformer runs/dit/transformer --folder runs/look

In batches and on the `validation` split, to steer the training; the card's figures come from `measure.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_vision_bridge.synthetic import cases as world

from .data import prompt_row, small
from .editor import Editor
from .single_frame import as_images
from .train_dit import load


def main() -> None:
    """Edit, judge, print, and save a sheet a kind."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    names = [(group, kind) for group in arguments.groups for kind in world.KINDS[group]]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn, initializer=one_core) as processes:
        made = dict(zip(names, processes.map(partial(_cases, arguments), names), strict=True))
        editor = load(arguments.target, arguments.vae, arguments.transformer, 0).to(device).eval()
        judged: dict[tuple[str, str, str], list[Future[bool]]] = {}
        images: dict[tuple[str, str], list[np.ndarray]] = {}
        for batch in batches(made, arguments.also, arguments.batch):
            scale = arguments.scale if batch[0].scale is None else batch[0].scale
            for one, image in zip(batch, edit(editor, batch, arguments.steps, scale), strict=True):
                name = one.group, one.kind
                arm = one.arm if one.scale is None else f"scale {one.scale:g}"
                future = processes.submit(_right, *name, arguments.split, one.index, image)
                judged.setdefault((*name, arm), []).append(future)
                if arm == "asked":
                    images.setdefault(name, []).append(image)
        for (group, kind), edited in images.items():
            _sheet(arguments.folder / f"{group}-{kind}.png", made[group, kind], edited)
        rows = [
            {
                "group": group,
                "kind": kind,
                "arm": arm,
                "right": np.mean([f.result() for f in futures]).item(),
                "n": len(futures),
            }
            for (group, kind, arm), futures in judged.items()
        ]
    _print(rows)
    (arguments.folder / "look.json").write_text(json.dumps(rows, indent=1) + "\n")


class Task(NamedTuple):
    """One edit: of a case, in an arm, with other guidance than usual or None."""

    group: str
    kind: str
    index: int
    arm: str
    scale: float | None
    case: world.Case
    seen: world.Case
    """Whose images the target sees."""


def batches(
    made: dict[tuple[str, str], list[world.Case]], also: list[float], size: int
) -> Iterator[list[Task]]:
    """All edits, in batches that share the number of images and the guidance."""
    alike: dict[tuple[int, float | None], list[Task]] = {}
    for (group, kind), cases in made.items():
        for index, case in enumerate(cases):
            arms: list[tuple[str, float | None]] = [("asked", None), *(("asked", scale) for scale in also)]
            if case.outright is not None:
                arms += [("outright", None), ("strange", None)]
            for arm, scale in arms:
                seen = cases[(index + 1) % len(cases)] if arm == "strange" else case
                task = Task(group, kind, index, arm, scale, case, seen)
                alike.setdefault((len(case.images), scale), []).append(task)
    for tasks in alike.values():
        yield from (tasks[first : first + size] for first in range(0, len(tasks), size))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("target", "vae", "transformer"):
        parser.add_argument(f"--{name}", required=True, help=f"folder of the {name}")
    parser.add_argument("--folder", type=Path, required=True, help="sheets and look.json")
    parser.add_argument("--groups", nargs="+", choices=world.GROUPS, default=list(world.GROUPS))
    parser.add_argument("--split", choices=world.SPLITS, default="validation")
    parser.add_argument("--cases", type=int, default=64, help="a kind")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0, help="guidance")
    parser.add_argument("--also", type=float, nargs="*", default=[], help="other guidance to try as asked")
    parser.add_argument("--workers", type=int, default=14)
    return parser.parse_args()


def one_core() -> None:
    """Keep this process to one core: OCR would start a thread for each, in every process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def _cases(arguments: argparse.Namespace, name: tuple[str, str]) -> list[world.Case]:
    return world.make_cases(name[0], arguments.cases, seed=0, split=arguments.split, kinds=(name[1],))


@torch.no_grad()
def edit(editor: Editor, tasks: list[Task], steps: int, scale: float) -> list[np.ndarray]:
    """Edited images, uint8 (128, 128, 3), each from the noise of its index."""
    device = editor.latents_mean.device
    full = _stack(np.stack([np.asarray(p) for p in task.case.images]) for task in tasks).to(device)
    seen = _stack(np.stack([small(p) for p in task.seen.images]) for task in tasks).to(device)
    prompts = [task.case.outright if task.arm == "outright" else task.case.prompt for task in tasks]
    text, length = (_stack(column).to(device) for column in zip(*map(prompt_row, prompts), strict=True))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), as_images(editor.vae):
        references = editor.references(full)
        states, empty = editor.embed(seen, text.int())
        seeds = [task.index for task in tasks]
        latents = editor.sample(references, states, empty, length, steps, scale, seeds)
        return list(editor.to_images(latents).cpu().numpy())


def _stack(arrays: Any) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(array) for array in arrays]))


def _right(group: str, kind: str, split: str, index: int, image: np.ndarray) -> bool:
    from qwen_vision_bridge.evaluation.correctness import judge

    case = world.make_cases(group, 1, seed=0, split=split, kinds=(kind,), first=index)[0]
    return judge(case, Image.fromarray(image)).right


def _sheet(path: Path, cases: list[world.Case], edited: list[np.ndarray], most: int = 12) -> None:
    """Rows of input, edit and target."""
    from PIL import ImageDraw

    shown = list(zip(cases, edited, strict=True))[:most]
    sheet = Image.new("RGB", (3 * 400, (len(shown) + 2) // 3 * 148), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (case, image) in enumerate(shown):
        x, y = index % 3 * 400, index // 3 * 148
        for column, part in enumerate((case.image, Image.fromarray(image), case.target)):
            sheet.paste(part, (x + column * 130, y))
        draw.text((x, y + 131), case.prompt, "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _print(rows: list[dict[str, Any]]) -> None:
    for group in dict.fromkeys(row["group"] for row in rows):
        for kind in dict.fromkeys(row["kind"] for row in rows if row["group"] == group):
            found = {row["arm"]: row["right"] for row in rows if row["kind"] == kind}
            print(f"{group:12} {kind:20} " + "  ".join(f"{arm} {value:.2f}" for arm, value in found.items()))


if __name__ == "__main__":
    main()
