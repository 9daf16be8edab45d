"""The plan of a training run before any download: models, memory and disk space.

GB are 10⁹ bytes, computed from parameter counts and shapes. Memory of activations and speed depend on the
machine; the plan says so where nothing was measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from ..bridge import VisionBridge, count_parameters
from ..loading.memory import BYTES, UNQUANTISED_ENCODER_B, usable_gpu_bytes
from ..specs import TARGET_PX, Family, cache_home
from .config import WORLD_SAMPLES, RunConfig, TrainingSettings
from .data import load_samples

SOURCE_TOWER_B, TARGET_TOWER_B, VAE_B = 0.576, 0.676, 0.127  # 10⁹ parameters of the released models
AREA = 384 * 384  # px² that the released editors show to the target
UNKNOWN = "unknown until measured"
STEPS_A_SECOND = {"perceive": "1.4 to 2.2", "edit": "0.4"}
"""Of the miniature's 32 samples on one busy CPU thread (`train_bridge.py`, seed 0, 2026-11-25)."""


class Need(NamedTuple):
    """One thing that a run loads or writes."""

    name: str
    place: str  # `device` or `disk`
    gb: float


def plan(run: RunConfig, settings: TrainingSettings) -> str:
    """The plan as text."""
    lines = [f"{run.family.name}: --method {run.method}; this plan downloads nothing"]
    edits = "edit" in run.kinds
    beside = "and the pipeline of 2. for the latents" if edits else "no language model"
    models = "language model and transformer" if edits else "language model"
    training = f"training through the frozen {models}; the towers are freed"
    if run.method == "calibrate":
        training = "regression on the CPU, then answers on held-out images"
    features = f"features, once (both vision towers, {beside})"
    phases = {features: features_needs(run), training: training_needs(run)}
    for number, (title, needs) in enumerate(phases.items(), 1):
        lines.append(f"{number}. {title}")
        lines += [f"   {need.name:<58} {need.place:<6} {need.gb:7.2f} GB" for need in needs]
        sums = {place: sum(n.gb for n in needs if n.place == place) for place in ("device", "disk")}
        total = ", ".join(f"{gb:.1f} GB of {place}" for place, gb in sums.items() if gb)
        lines.append(f"   in all {total}; activations {UNKNOWN}")
    lines.append(f"download at most {download_gb(run):.1f} GB, less what is on disk already")
    return "\n".join([*lines, _speed(run, settings), _machine(run)])


def features_needs(run: RunConfig) -> list[Need]:
    """Needs of the feature extraction."""
    family, count = run.family, _sample_count(run) + run.validation_samples
    if _is_small(family):
        needs = [Need("both towers, fp32", "device", 0.01)]
    else:
        needs = [
            Need(f"vision tower of {family.source.name}, bf16", "device", 2 * SOURCE_TOWER_B),
            Need(f"vision tower of {family.target.name}, bf16", "device", 2 * TARGET_TOWER_B),
        ]
    config, tokens, images = run.bridge_config, tokens_of(family), len(run.kinds) * count
    width = len(config.levels) * config.source_dim + config.target_dim * (2 if run.highres_target else 1)
    name = f"features of {images} images of about {tokens} tokens, bf16"
    needs.append(Need(name, "disk", images * tokens * width * 2 / 1e9))
    if "edit" in run.kinds:
        latents = (family.editor.vae_area or 1024 * 1024) // 256
        needs.append(Need("latents before and after", "disk", count * latents * 2 * 64 * 2 / 1e9))
    return needs


def training_needs(run: RunConfig) -> list[Need]:
    """Needs that stay on the device while training."""
    family, editor = run.family, run.family.editor
    bits, precision = (8, "8-bit") if run.load_in_8bit else (None, "bf16")
    if _is_small(family):
        needs = [Need("all frozen models, fp32", "device", 0.08)]
    else:
        unquantised = min(UNQUANTISED_ENCODER_B, editor.encoder_params)
        encoder = (editor.encoder_params - unquantised) * BYTES[bits] + 2 * unquantised
        needs = [Need(f"{family.target.name} with its language model, {precision}", "device", encoder)]
        if "edit" in run.kinds:
            transformer = editor.transformer_params * BYTES[bits]
            needs.append(Need(f"transformer of {editor.name}, {precision}", "device", transformer))
            needs.append(Need("VAE, bf16", "device", 2 * VAE_B))
    if run.method != "calibrate":
        size = count_parameters(VisionBridge(run.bridge_config))
        name = f"bridge, {size / 1e6:.1f} M parameters, with gradient, moments and average, fp32"
        needs.append(Need(name, "device", 5 * 4 * size / 1e9))
    return needs


def download_gb(run: RunConfig) -> float:
    """GB of weights that a run may download."""
    if _is_small(run.family):
        return 0.0
    editor = run.family.editor
    whole = 2 * (SOURCE_TOWER_B + editor.encoder_params)
    return whole + (2 * (editor.transformer_params + VAE_B) if "edit" in run.kinds else 0.0)


def tokens_of(family: Family) -> int:
    """Merged tokens of a square image at the size that the editor shows to the target."""
    if _is_small(family):  # whose processor has a limit of its own
        return (TARGET_PX // family.target.token_px) ** 2
    return round(AREA**0.5 / family.target.token_px) ** 2


def _speed(run: RunConfig, settings: TrainingSettings) -> str:
    if run.method == "calibrate":
        return f"time: {UNKNOWN}"
    samples = settings.train_batch_size * settings.gradient_accumulation_steps
    measured = STEPS_A_SECOND.get(run.method) if _is_small(run.family) else None
    speed = f"{measured} were measured for 32 samples on one CPU thread" if measured else UNKNOWN
    return (
        f"{settings.max_train_steps} steps of {samples} samples a process; steps a second: {speed} "
        "(log.jsonl has them after the first steps)"
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


def _sample_count(run: RunConfig) -> int:
    """Number of samples of a kind; those of a hub dataset are unknown before the download."""
    if run.train_data_dir is None:
        return run.max_train_samples or WORLD_SAMPLES
    return max(len(load_samples(run, kind).train) for kind in run.kinds)


def _is_small(family: Family) -> bool:
    return family.editor.transformer_params == 0
