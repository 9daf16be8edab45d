"""What this machine can run: checks that return data. `check_environment.py` prints them."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from .loading.memory import MEMORY_MODES, best_mode, plan_for
from .specs import FAMILIES, cache_home

MINIATURE_RAM_GB = 2.0
QWEN_DOWNLOAD_GB = 59.0  # the editor's 57.7 GB and the source's tower


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do where it is not ok."""
    required: bool = True
    """Whether nothing runs without it."""


class FamilyReport(NamedTuple):
    """Whether a family can run here, and how."""

    family: str
    runs: bool
    memory_mode: str | None
    arguments: str
    reason: str
    plan: tuple[str, ...] = ()
    """What lies where in that mode, in lines."""


class Report(NamedTuple):
    """Everything that was looked at."""

    checks: list[Check]
    families: list[FamilyReport]

    @property
    def ok(self) -> bool:
        """Whether some family can run."""
        return all(check.ok for check in self.checks if check.required) and any(f.runs for f in self.families)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {
            "ok": self.ok,
            "checks": [check._asdict() for check in self.checks],
            "families": [family._asdict() for family in self.families],
        }


def inspect_machine(card_gb: float | None = None) -> Report:
    """Look at Python, packages, memory, GPUs and disk; say which families can run, in which memory mode.

    Args:
        card_gb: plan for a GPU of this many 10⁹ bytes instead of those that are here.
    """
    checks = [_python(), *_packages()]
    if not all(check.ok for check in checks):
        return Report(checks, [])
    ram_gb = _ram_gb()
    gpus = gpu_memory_gb() if card_gb is None else [("a card to plan for", card_gb, card_gb)]
    checks.append(
        Check(
            "memory",
            ram_gb >= MINIATURE_RAM_GB,
            f"{ram_gb:.1f} GB available",
            f"close other programs: the miniature needs {MINIATURE_RAM_GB:.0f} GB",
        )
    )
    checks += [
        Check(f"GPU {index}", True, f"{name}, {free:.1f} of {total:.1f} GB free", required=False)
        for index, (name, free, total) in enumerate(gpus)
    ]
    if not gpus:
        remedy = "the qwen family edits on an NVIDIA GPU; the miniature runs without one"
        checks.append(Check("GPU", False, "no CUDA device", remedy, required=False))
    checks += _disk()
    return Report(checks, [_miniature(ram_gb), _qwen(ram_gb, gpus)])


def choose_family(wanted: str) -> tuple[str, str]:
    """The family for `--models`, and one line that says why and how to get the other.

    Raises:
        ValueError: neither `auto` nor a family.
    """
    if wanted != "auto":
        if wanted not in FAMILIES:
            raise ValueError(f"--models is auto or one of {', '.join(sorted(FAMILIES))}, not {wanted!r}")
        return wanted, f"Models: {wanted} (as asked)"
    gpus = gpu_memory_gb()
    mode = best_mode(FAMILIES["qwen"], max((total for _, _, total in gpus), default=0.0), _ram_gb())
    if mode is not None:
        return (
            "qwen",
            f"Models: qwen, since a GPU is here ({mode.name}); --models miniature takes the small family",
        )
    why = "no CUDA device" if not gpus else "too little GPU or CPU memory for the released models"
    return "miniature", f"Models: miniature, since there is {why}; --models qwen takes the released models"


def gpu_memory_gb() -> list[tuple[str, float, float]]:
    """(name, free, total) of each CUDA device, in 10⁹ bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append((torch.cuda.get_device_name(index), free / 1e9, total / 1e9))
    return found


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _packages() -> list[Check]:
    from packaging.requirements import Requirement

    checks = []
    for line in metadata.requires("qwen-vision-bridge") or []:
        wanted = Requirement(line)
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        ok = found != "missing" and wanted.specifier.contains(found, prereleases=True)
        checks.append(
            Check(wanted.name, ok, found, f"run `uv sync`: {wanted.name}{wanted.specifier} is needed")
        )
    return checks


def _disk() -> list[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    checks = []
    for name, folder, need in (
        ("disk, toolkit cache", cache_home(), 0.2),
        ("disk, hub cache", Path(HF_HUB_CACHE), QWEN_DOWNLOAD_GB),
    ):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(there).free / 1e9
        whose = "the released models need" if need > 1 else "the miniature and its features need"
        checks.append(
            Check(
                name,
                free >= need,
                f"{free:.0f} GB free",
                f"{whose} {need:g} GB in {folder}",
                required=need < 1,
            )
        )
    return checks


def _miniature(ram_gb: float) -> FamilyReport:
    runs = ram_gb >= MINIATURE_RAM_GB
    return FamilyReport("miniature", runs, "plain", "none", "runs anywhere" if runs else "too little memory")


def _qwen(ram_gb: float, gpus: list[tuple[str, float, float]]) -> FamilyReport:
    if not gpus:
        return FamilyReport("qwen", False, None, "", "no CUDA device")
    free = max(free for _, free, _ in gpus)
    plan = plan_for(FAMILIES["qwen"], free, ram_gb)
    if plan is None:
        least = min(mode.peak_gb(FAMILIES["qwen"].editor) for mode in MEMORY_MODES)
        return FamilyReport(
            "qwen", False, None, "", f"{free:.1f} GB of GPU memory are free, {least:.1f} GB is the least"
        )
    reason = f"needs about {plan.peak_gb:.0f} of {free:.0f} GB (estimate)"
    return FamilyReport("qwen", True, plan.mode.name, plan.mode.arguments, reason, tuple(plan.lines()))


def _ram_gb() -> float:
    import psutil

    return psutil.virtual_memory().available / 1e9
