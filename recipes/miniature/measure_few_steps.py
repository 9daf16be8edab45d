"""Measure edits in few steps beside those of 20 steps with guidance, with the bridge and its controls.

    python -m recipes.miniature.measure_few_steps --folder runs/few-steps --output few-steps.json

Draws every image that the folder lacks, then judges them; `--draw-only` leaves that to another machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwen_vision_bridge import EnhancedQwenImageEdit
from qwen_vision_bridge.case import GROUPS, Case
from qwen_vision_bridge.controls import Features, target_levels
from qwen_vision_bridge.evaluation.metrics.correctness import judge
from qwen_vision_bridge.evaluation.metrics.registry import METRICS
from qwen_vision_bridge.evaluation.statistics import BASELINE, compare_arms
from qwen_vision_bridge.io import digest_of, provenance, write_image, write_json
from qwen_vision_bridge.loading.editors import few_step_scheduler
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.synthetic import cases as world

SEED = 1  # of the cases, as on the miniature's card
KINDS = {group: tuple(kinds) for group, kinds in world.KINDS.items() if group != "consistency"}


@dataclass(frozen=True)
class Setting:
    """One way to edit every case."""

    name: str
    fast: int | None = None
    """Steps of the few-step LoRA; None is 20 steps with guidance."""
    lora: bool = True
    """Whether that LoRA is loaded, or its schedule alone taken."""
    strength: float | None = None
    """Of the bridge; None is the baseline."""
    features: Features = "own"


SETTINGS = (
    Setting("20-steps"),
    Setting("20-steps-bridge", strength=1.0),
    Setting("4-steps", 4),
    Setting("4-steps-without-lora", 4, lora=False),
    Setting("4-steps-bridge", 4, strength=1.0),
    Setting("4-steps-bridge-0.5", 4, strength=0.5),
    Setting("4-steps-bridge-1.5", 4, strength=1.5),
    Setting("4-steps-bridge-2", 4, strength=2.0),
    Setting("4-steps-shuffled", 4, strength=1.0, features="shuffled"),
    Setting("4-steps-target-only", 4, strength=1.0, features="target"),
)
BESIDE = dict.fromkeys(("20-steps", "20-steps-bridge", "4-steps", "4-steps-without-lora"), "20-steps")
"""What a setting is compared with, where it is not the baseline of 4 steps."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, judge and write."""
    arguments = _arguments(argv)
    cases = [case for group in KINDS for case in cases_of(group, arguments)]
    settings = [each for each in SETTINGS if each.name in arguments.settings]
    for alike in dict.fromkeys((each.fast, each.lora) for each in settings):
        draw([each for each in settings if (each.fast, each.lora) == alike], cases, arguments)
    if arguments.draw_only:
        return
    records = judged(settings, cases, arguments)
    rows = rows_of(records)
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    about = provenance([SEED], device, drawn_on=arguments.drawn_on or device, split=arguments.split)
    write_json(arguments.output, {"about": about, "rows": rows})
    for row in rows:
        few = row["ci_low"] is None
        interval = "" if few else f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        print(
            f"{row['group']:7}{row['difficulty']:5} {row['setting']:21} {row['right']:.3f}, beside "
            f"{row['beside']} {row['difference']:+.3f}{interval}, n {row['n']}"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="of the images")
    add("--output", type=Path, default=Path("few-steps.json"))
    add("--cases", type=int, default=160, help="about so many easy and so many hard cases a group")
    add("--split", choices=world.SPLITS, default="test")
    add("--batch", type=int, default=64, help="edits denoised together")
    add("--workers", type=int, default=2, help="processes that judge")
    add("--settings", nargs="+", default=[each.name for each in SETTINGS])
    add("--draw-only", action="store_true")
    add("--drawn-on", help="device that drew, where it is another one than this")
    return parser.parse_args(argv)


def cases_of(group: str, arguments: argparse.Namespace) -> Iterator[Case]:
    """Easy and hard cases of a group in equal numbers, as many of each kind."""
    for kinds in (_easy(group), world.HARD[group]):
        if kinds:
            yield from world.make_cases(
                group, arguments.cases, SEED, split=arguments.split, kinds=tuple(kinds)
            )


def _easy(group: str) -> list[str]:
    return [kind for kind in KINDS[group] if kind not in world.HARD[group]]


def draw(settings: Sequence[Setting], cases: Sequence[Case], arguments: argparse.Namespace) -> None:
    """Draw the images that the folder lacks, with one pipeline for settings of the same LoRA."""
    from tqdm import tqdm

    first = settings[0]
    pipeline = EnhancedQwenImageEdit("miniature", fast=first.fast if first.lora else None, dtype="fp32")
    if first.fast and not first.lora:
        pipeline.pipe.scheduler = few_step_scheduler()
        pipeline.family = replace(pipeline.family, steps=first.fast, true_cfg_scale=1.0, negative_prompt=None)
    pipeline.pipe.set_progress_bar_config(disable=True)
    partners = {one.case_id: other for one, other in pairwise([*cases, cases[0]])}
    for setting in settings:
        wanted = [case for case in cases if not _path(arguments.folder, setting, case).is_file()]
        with pipeline.keeping_source(), tqdm(total=len(wanted), desc=setting.name) as bar:
            for first in range(0, len(wanted), arguments.batch):
                some = wanted[first : first + arguments.batch]
                edits = [_prepared(pipeline, setting, case, partners[case.case_id]) for case in some]
                for case, image in zip(some, pipeline.denoise(edits), strict=True):
                    write_image(_path(arguments.folder, setting, case), image)
                bar.update(len(some))


def _prepared(pipeline: EnhancedQwenImageEdit, setting: Setting, case: Case, partner: Case) -> Any:
    edit = pipeline.check_edit(case.images, case.prompt, int(digest_of([SEED, case.case_id])[:7], 16))
    if setting.strength is None:
        return pipeline.prepare(edit)
    source: Any = target_levels(pipeline.bridge.config)
    if setting.features != "target":
        source = pipeline.extract_source(partner.images if setting.features == "shuffled" else case.images)
    return pipeline.prepare(replace(edit, bridge=pipeline.bridge, source=source, strength=setting.strength))


def _path(folder: Path, setting: Setting, case: Case) -> Path:
    return folder / setting.name / f"{case.case_id}.png"


def judged(
    settings: Sequence[Setting], cases: Sequence[Case], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One record an image, with whether it is right."""
    jobs = [
        (setting.name, case, _path(arguments.folder, setting, case)) for case in cases for setting in settings
    ]
    with ProcessPoolExecutor(arguments.workers) as pool:
        return list(pool.map(_record, jobs, chunksize=16))


def _record(job: tuple[str, Case, Path]) -> dict[str, Any]:
    setting, case, path = job
    with Image.open(path) as image:
        right = float(judge(case, image.convert("RGB")).right)
    facts = {name: getattr(case, name) for name in ("case_id", "group", "kind", "difficulty")}
    return {**facts, "arm": setting, "level": "edit", "error": None, "metrics": {"right": right}}


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of right edits of every setting, and its paired difference from what it is compared with."""
    rows = []
    for setting in dict.fromkeys(record["arm"] for record in records):
        beside = BESIDE.get(setting, "4-steps")
        some = [{**record, "arm": BASELINE} for record in records if record["arm"] == beside]
        some += [record for record in records if record["arm"] == setting]
        for difficulty in ("easy", "hard"):
            alike = [record for record in some if record["difficulty"] == difficulty]
            for row in compare_arms(alike, METRICS, GROUPS):
                labels = {"group": row.group, "difficulty": difficulty, "setting": setting, "beside": beside}
                values = {"right": row.value, "difference": row.difference}
                interval = {"ci_low": row.ci_low, "ci_high": row.ci_high, "n": row.n}
                rows.append({**labels, **values, **interval})
    return sorted(rows, key=lambda row: (row["group"], row["difficulty"]))


if __name__ == "__main__":
    main()
