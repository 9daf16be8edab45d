"""What a training run would load, where it would go and how much memory it takes: before any download.

GB are 10⁹ bytes, worked out from parameter counts and shapes. What activations take and how many steps a
second there are depends on the machine: the plan says so where nothing was measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from ..bridge import BridgeConfig, VisionBridge, count_parameters
from ..loading.editors import BYTES, UNQUANTISED_ENCODER_B
from ..loading.memory import usable_gpu_bytes
from ..specs import TARGET_PX, Family, cache_home
from .config import TrainingSettings
from .run import WORLD_SAMPLES, RunConfig

SOURCE_TOWER_B, TARGET_TOWER_B, VAE_B = 0.576, 0.676, 0.127  # 10⁹ parameters of the released models
AREA = 384 * 384  # px² that the released editors show to the target
UNKNOWN = "unknown until measured"
STEPS_A_SECOND = {"perceive": "1.4 to 2.2", "edit": "0.4"}
"""Of the miniature's 32 samples on one busy CPU thread (`train_bridge.py`, seed 0, 2026-11-25)."""


class Need(NamedTuple):
    """One thing that a run loads or writes."""

    what: str
    where: str
    gb: float


def plan(run: RunConfig, settings: TrainingSettings) -> str:
    """The plan as text."""
    lines = [f"{run.family.name}: --method {run.method}, nothing is downloaded by this plan"]
    for title, needs in (
        ("1. " + _first(run), features_needs(run)),
        ("2. " + _second(run), training_needs(run)),
    ):
        lines.append(title)
        lines += [f"   {need.what:<58} {need.where:<6} {need.gb:7.2f} GB" for need in needs]
        sums = {where: sum(n.gb for n in needs if n.where == where) for where in ("device", "disk")}
        total = ", ".join(f"{gb:.1f} GB of {where}" for where, gb in sums.items() if gb)
        lines.append(f"   in all {total}; activations {UNKNOWN}")
    lines += [f"download at most {download_gb(run):.1f} GB, less what is on disk already"]
    lines += [_steps(run, settings), _machine(run)]
    return "\n".join(lines)


def features_needs(run: RunConfig) -> list[Need]:
    """What working out the features takes."""
    family, count = run.family, _samples(run)
    config = run.config or BridgeConfig.for_family(family)
    tokens = tokens_of(family)
    width = len(config.levels) * config.source_dim + config.target_dim * (2 if run.teacher else 1)
    images = len(run.kinds) * (count + run.validation_samples)
    needs = (
        []
        if _is_small(family)
        else [
            Need(f"vision tower of {family.source.name}, bf16", "device", 2 * SOURCE_TOWER_B),
            Need(f"vision tower of {family.target.name}, bf16", "device", 2 * TARGET_TOWER_B),
        ]
    )
    if _is_small(family):
        needs.append(Need("both towers, fp32", "device", 0.01))
    what = f"features of {images} images of about {tokens} tokens, bf16"
    needs.append(Need(what, "disk", images * tokens * width * 2 / 1e9))
    if "edit" in run.kinds:
        latents = (run.family.editor.vae_area or 1024 * 1024) // 256
        edits = count + run.validation_samples
        needs.append(Need("latents before and after", "disk", edits * latents * 2 * 64 * 2 / 1e9))
    return needs


def training_needs(run: RunConfig) -> list[Need]:
    """What stays on the device while training."""
    family, needs = run.family, []
    bits = 8 if run.load_in_8bit else None
    named = "8-bit" if bits else "bf16"
    if _is_small(family):
        needs.append(Need("all frozen models, fp32", "device", 0.08))
    else:
        kept = min(UNQUANTISED_ENCODER_B, family.editor.encoder_params)
        encoder = (family.editor.encoder_params - kept) * BYTES[bits] + 2 * kept
        needs.append(Need(f"{family.target.name} with its language model, {named}", "device", encoder))
        if "edit" in run.kinds:
            dit = family.editor.transformer_params * BYTES[bits]
            needs.append(Need(f"transformer of {family.editor.name}, {named}", "device", dit))
            needs.append(Need("VAE, bf16", "device", 2 * VAE_B))
    config = run.bridge.config if run.bridge else run.config or BridgeConfig.for_family(family)
    size = count_parameters(VisionBridge(config))
    if run.method != "calibrate":
        what = f"bridge, {size / 1e6:.1f} M parameters, with gradient, moments and average, fp32"
        needs.append(Need(what, "device", 5 * 4 * size / 1e9))
    return needs


def download_gb(run: RunConfig) -> float:
    """GB of weights that a run may fetch."""
    if _is_small(run.family):
        return 0.0
    editor = run.family.editor
    whole = 2 * (SOURCE_TOWER_B + editor.encoder_params)
    return whole + (2 * (editor.transformer_params + VAE_B) if "edit" in run.kinds else 0.0)


def tokens_of(family: Family) -> int:
    """Merged tokens of a square image as the editor shows it to the target."""
    if _is_small(family):  # whose processor has a limit of its own
        return (TARGET_PX // family.target.token_px) ** 2
    return round(AREA**0.5 / family.target.token_px) ** 2


def _first(run: RunConfig) -> str:
    if "edit" in run.kinds:
        return "features, once (both vision towers, and for the latents already the pipeline of 2.)"
    return "features, once (both vision towers, no language model)"


def _second(run: RunConfig) -> str:
    if run.method == "calibrate":
        return "regression on the CPU, then reading held-out images"
    through = "language model and transformer" if "edit" in run.kinds else "language model"
    return f"training through the frozen {through}; the towers are freed"


def _steps(run: RunConfig, settings: TrainingSettings) -> str:
    if run.method == "calibrate":
        return f"time: {UNKNOWN}"
    whole = settings.train_batch_size * settings.gradient_accumulation_steps
    known = STEPS_A_SECOND.get(run.method) if _is_small(run.family) else None
    speed = f"{known} were measured for 32 samples on one CPU thread" if known else UNKNOWN
    return (
        f"{settings.max_train_steps} steps of {whole} samples a process; steps a second: {speed} "
        "(log.jsonl says after the first steps)"
    )


def _machine(run: RunConfig) -> str:
    folder = run.cache_dir or cache_home()
    while not Path(folder).exists():
        folder = Path(folder).parent
    free = shutil.disk_usage(folder).free / 1e9
    if torch.cuda.is_available():
        memory = usable_gpu_bytes(torch.device("cuda"))[0] / 1e9
        return f"this machine: {memory:.0f} GB of GPU memory and {free:.0f} GB of disk are free"
    return f"this machine: no CUDA device; {free:.0f} GB of disk are free"


def _samples(run: RunConfig) -> int:
    """How many samples of a kind there will be; those of a hub dataset are not counted before it is there."""
    if run.train_data_dir is None:
        return run.max_train_samples or WORLD_SAMPLES
    return max(len(run.samples(kind)[0]) for kind in run.kinds)


def _is_small(family: Family) -> bool:
    return family.editor.transformer_params == 0
