"""Measure the finished miniature on cases it has never seen, and write the figures of its card.

    python -m recipes.miniature.measure --source weights/source --editor weights/editor --output card.json

Edits go through the stock pipeline, 20 steps, without any bridge, as the baseline of an evaluation: a run
that was stopped goes on. `accelerate launch` shares the cases among GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qwen_vision_bridge.case import Case
from qwen_vision_bridge.evaluation.arms import Arm, Patch
from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
from qwen_vision_bridge.evaluation.statistics import BASELINE, bootstrap_interval
from qwen_vision_bridge.injection import replace_vision
from qwen_vision_bridge.io import write_json
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.patches import condition_size
from qwen_vision_bridge.synthetic import cases as world

if TYPE_CHECKING:
    from qwen_vision_bridge import EnhancedQwenImageEdit

PARTS = {"vae": "VAE:", "reading": "reading:", "cost": "cost:", "edits": ""}  # how their figures' names begin
AS_ASKED, EXPLICIT, SHUFFLED = "as-asked", "explicit-prompt", "shuffled-image"
EXPLICIT_ID = "-explicit"  # ends the ids of cases with an explicit prompt
CHANGED_TEXT = ("change_text",)
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


class Edited(NamedTuple):
    """The verdict on one edit."""

    case_id: str
    group: str
    kind: str
    arm: str
    """`as-asked`; `explicit-prompt`, nothing left to see; `shuffled-image`, another case's vision."""
    right: float

    @classmethod
    def of(cls, record: dict[str, Any]) -> Edited:
        """From an evaluation's record."""
        case_id, arm = record["case_id"], AS_ASKED if record["arm"] == BASELINE else record["arm"]
        if case_id.endswith(EXPLICIT_ID):
            case_id, arm = case_id.removesuffix(EXPLICIT_ID), EXPLICIT
        return cls(case_id, record["group"], record["kind"], arm, record["metrics"].get("right", 0.0))


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
    about = {
        "device": device_name(arguments.device),
        "seed": arguments.seed,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    kept = [row for row in kept if part_of(row["name"]) not in arguments.parts]
    write_json(arguments.output, [*kept, *({**about, **row} for row in rows)])
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
    parser.add_argument("--rarely", type=int, default=4, help="take every so many-th hard case in all arms")
    parser.add_argument("--groups", nargs="+", choices=world.GROUPS, default=list(world.GROUPS))
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure; the card keeps its other figures: new weights want a new card",
    )
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=1, help="of the cases")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, help="guidance; default: the family's")
    parser.add_argument("--workers", type=int, default=0, help="processes that measure images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def cases_of(arguments: argparse.Namespace, kind: str, group: str) -> tuple[list[Case], dict[str, Case]]:
    """Held-out cases of a kind, and for each hard one of every `--rarely`-th another case by its id."""
    count = -(-arguments.cases // len(world.KINDS[group]))
    cases = world.make_cases(group, count + 1, arguments.seed, split=arguments.split, kinds=(kind,))
    if kind not in world.HARD[group]:
        return cases[:-1], {}
    others = {case.case_id: other for case, other in itertools.pairwise(cases)}
    return cases[:-1], {case.case_id: others[case.case_id] for case in cases[: -1 : arguments.rarely]}


def explicit_case(case: Case) -> Case:
    """The same case with nothing left to see in its prompt."""
    return replace(case, case_id=f"{case.case_id}{EXPLICIT_ID}", prompt=case.edit.explicit_prompt)


def edits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure edits as asked, and hard ones with an explicit prompt and with another image's vision too."""
    from qwen_vision_bridge import EnhancedQwenImageEdit

    pipeline = EnhancedQwenImageEdit(
        "miniature", editor=arguments.editor, bridge="fresh", device=arguments.device, dtype=torch.float32
    )
    pipeline.pipe.set_progress_bar_config(disable=True)
    cases: list[Case] = []
    others: dict[str, Case] = {}
    for group in arguments.groups:
        for kind in world.KINDS[group]:
            some, of_kind = cases_of(arguments, kind, group)
            cases, others = cases + some, others | of_kind
    hard = [case for case in cases if case.case_id in others]
    explicit = [explicit_case(case) for case in hard if case.edit.explicit_prompt is not None]
    shuffled = Arm(SHUFFLED, patch=_see_others(others), patch_name="the next case of the kind")
    options: dict[str, Any] = {"num_inference_steps": arguments.steps}
    if arguments.scale is not None:
        options["true_cfg_scale"] = arguments.scale
    options |= {"perception": False, "options": EvaluationOptions(workers=arguments.workers)}
    folder, baseline = arguments.output.with_suffix(".edits"), Arm(BASELINE)
    results = [evaluate(pipeline, [*cases, *explicit], folder, [baseline], arguments.seed, **options)]
    if hard:
        results.append(evaluate(pipeline, hard, folder, [baseline, shuffled], arguments.seed, **options))
    records = {record["key"]: record for result in results if result for record in result.records}
    return edit_rows(list(records.values()))


def _see_others(others: dict[str, Case]) -> Patch:
    """Show the target's language model another case's vision, by the case's id."""

    @contextmanager
    def patch(pipeline: EnhancedQwenImageEdit, case: Case) -> Iterator[None]:
        with replace_vision(pipeline.pipe, _vision_of(pipeline, others[case.case_id])):
            yield

    return patch


@torch.no_grad()
def _vision_of(pipeline: EnhancedQwenImageEdit, case: Case) -> torch.Tensor:
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
    edits = [Edited.of(record) for record in records if "right" in record["metrics"]]

    def right(pick: Callable[[Edited], bool]) -> list[float]:
        return [edit.right for edit in edits if pick(edit)]

    rows = []
    for name, kinds in (
        ("edit: explicit text change, exact", CHANGED_TEXT),
        ("edit: move, swap, align right", PLACED),
        ("edit: recolour, remove right", PAINTED),
    ):
        if values := right(lambda edit, kinds=kinds: edit.kind in kinds and edit.arm == AS_ASKED):
            rows.append(row_of(name, values))
    similar = [r["metrics"].get("unedited_ssim") for r in records if Edited.of(r).arm == AS_ASKED]
    if values := [value for value in similar if value is not None]:
        rows.append(row_of("edit: SSIM of the unedited region", values))
    for group, kind in dict.fromkeys((edit.group, edit.kind) for edit in edits):
        for arm in (AS_ASKED, EXPLICIT, SHUFFLED):
            if values := right(lambda edit, wanted=(kind, arm): (edit.kind, edit.arm) == wanted):
                difficulty = "hard" if kind in world.HARD[group] else "easy"
                rows.append(row_of(f"{difficulty} {group}/{kind}: {arm}", values))
    return [*rows, *headroom_rows(edits)]


def headroom_rows(edits: list[Edited]) -> list[dict[str, Any]]:
    """Paired differences over the hard kinds of a group: what seeing could win, what vision is used for."""
    rows = []
    for group in dict.fromkeys(edit.group for edit in edits):
        by_case: dict[str, dict[str, float]] = {}
        for edit in edits:
            if edit.group == group and edit.kind in world.HARD[group]:
                by_case.setdefault(edit.case_id, {})[edit.arm] = edit.right
        for name, first, second in (("headroom", EXPLICIT, AS_ASKED), ("use of vision", AS_ASKED, SHUFFLED)):
            if pairs := [
                arms[first] - arms[second] for arms in by_case.values() if {first, second} <= set(arms)
            ]:
                rows.append(row_of(f"{name}: {group}, {first} minus {second}", pairs))
    return rows


def vae_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """How well the VAE gives held-out images back, through stock code."""
    from diffusers import AutoencoderKLQwenImage

    from .data import images
    from .train_vae import psnr_of

    vae = AutoencoderKLQwenImage.from_pretrained(arguments.editor, subfolder="vae", torch_dtype=torch.float32)
    held_out = torch.from_numpy(images(arguments.split, 0, arguments.cases)).to(arguments.device)
    return [row_of("VAE: PSNR, dB", psnr_of(vae.to(arguments.device), held_out))]


def reading_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Letters of held-out images that source and target read right."""
    from .models import build_reader
    from .train_vlm import read_letters

    rows = []
    for role, folder in (("source", arguments.source), ("target", f"{arguments.editor}/text_encoder")):
        reader = build_reader(role, 0, folder).to(arguments.device)
        rights = read_letters(reader, role, arguments.cases, arguments.split)
        rows.append(row_of(f"reading: letters right, {role}", [np.mean(word) for word in rights]))
        rows.append(row_of(f"reading: words right, {role}", [float(all(word)) for word in rights]))
    return rows


def cost_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Loading, time and memory of an edit on two threads of this machine's processor."""
    from .cost import named, repeated

    costs = repeated(arguments.source, arguments.editor, arguments.steps)
    return [row_of(name, values) for name, values in named(costs).items()]


if __name__ == "__main__":
    main()
