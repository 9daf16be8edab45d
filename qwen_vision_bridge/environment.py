"""Checks of what this machine can run, as data; `check_environment.py` prints them."""

from __future__ import annotations

import logging
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .io import version_of
from .loading.memory import device_name, plan_for
from .loading.registry import FAMILIES
from .specs import Family, cache_home

logger = logging.getLogger(__name__)

MINIATURE_RAM_GB = 2.0
QWEN_DOWNLOAD_GB = 59.0  # the editor's 57.7 GB and the source's tower


class Check(NamedTuple):
    """One check and its result."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do where the check fails."""
    required: bool = True
    """Whether nothing runs where it fails."""


class FamilyReport(NamedTuple):
    """Whether a family can run on this machine, and how."""

    family: str
    runs: bool
    memory_mode: str | None
    arguments: str
    reason: str
    plan: tuple[str, ...] = ()
    """Lines that say which part lies where in that mode."""


class Report(NamedTuple):
    """The checks of a machine and its families."""

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


def inspect_machine(gpu_gb: float | None = None) -> Report:
    """Check Python, packages, memory, GPUs and disk, and which families can run in which memory mode.

    Args:
        gpu_gb: plan for a GPU of this many 10⁹ bytes instead of the installed ones.
    """
    checks = [_python(), *_packages()]
    if not all(check.ok for check in checks):
        return Report(checks, [])
    checks += _bytecode()
    ram_gb = _ram_gb()
    gpus = gpu_memory_gb() if gpu_gb is None else [("planned GPU", gpu_gb, gpu_gb)]
    remedy = f"close other programs: the miniature needs {MINIATURE_RAM_GB:.0f} GB"
    checks.append(Check("memory", ram_gb >= MINIATURE_RAM_GB, f"{ram_gb:.1f} GB available", remedy))
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
    """The family for `--models`, and one line with the reason and the way to the other family.

    Raises:
        ValueError: neither `auto` nor a family.
    """
    if wanted != "auto":
        if wanted not in FAMILIES:
            raise ValueError(f"--models is auto or one of {', '.join(sorted(FAMILIES))}, not {wanted!r}")
        return wanted, f"Models: {wanted} (as requested)"
    gpus = gpu_memory_gb()
    plan = plan_for(FAMILIES["qwen"], max((total for _, _, total in gpus), default=0.0), _ram_gb())
    if plan is not None:
        reason = f"since there is a GPU ({plan.mode.name})"
        return "qwen", f"Models: qwen, {reason}; --models miniature takes the small family"
    reason = "no CUDA device" if not gpus else "too little GPU or CPU memory for the released models"
    return "miniature", f"Models: miniature, since there is {reason}; --models qwen takes the released models"


def named_family(family: str | Family) -> str | Family:
    """The same, and for `"auto"` what `choose_family` chooses, with a warning where it is the miniature."""
    if family != "auto":
        return family
    name, line = choose_family("auto")
    logger.log(logging.WARNING if name == "miniature" else logging.INFO, line)
    return name


def gpu_memory_gb() -> list[tuple[str, float, float]]:
    """(name, free, total) of each CUDA device, in 10⁹ bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(device) for device in devices]
    return [
        (device_name(device), free / 1e9, total / 1e9)
        for device, (free, total) in zip(devices, memory, strict=True)
    ]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _bytecode() -> list[Check]:
    """A note where every start compiles torch and its like anew: nothing has kept their bytecode, or will."""
    spec = find_spec("torch")
    if not sys.dont_write_bytecode or spec is None or spec.cached is None or Path(spec.cached).is_file():
        return []
    found = "packages are compiled at every start (PYTHONDONTWRITEBYTECODE is set), about 8 s for an edit"
    return [Check("bytecode", False, found, "run `uv sync --compile-bytecode` once", required=False)]


def _packages() -> list[Check]:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("qwen-vision-bridge") or []
    except metadata.PackageNotFoundError:
        return [Check("qwen-vision-bridge", False, "not installed", "run `uv sync` in its folder")]
    checks = []
    for line in lines:
        package = Requirement(line)
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue  # of an extra, or of another platform
        version = version_of(package.name)
        ok = version != "unknown" and package.specifier.contains(version, prereleases=True)
        remedy = f"run `uv sync`: {package.name}{package.specifier} is needed"
        checks.append(Check(package.name, ok, "missing" if version == "unknown" else version, remedy))
    return checks


def _disk() -> list[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    checks = []
    for name, folder, need in (
        ("disk, toolkit cache", cache_home(), 0.2),
        ("disk, hub cache", Path(HF_HUB_CACHE), QWEN_DOWNLOAD_GB),
    ):
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(existing).free / 1e9
        user = "the released models need" if need > 1 else "the miniature and its features need"
        remedy = f"{user} {need:g} GB in {folder}"
        checks.append(Check(name, free >= need, f"{free:.0f} GB free", remedy, required=need < 1))
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
        reason = f"no memory mode fits {free:.1f} GB of free GPU memory and {ram_gb:.1f} GB of CPU memory"
        return FamilyReport("qwen", False, None, "", reason)
    reason = f"needs about {plan.peak_gb:.0f} of {free:.0f} GB (estimate)"
    return FamilyReport("qwen", True, plan.mode.name, plan.mode.arguments, reason, tuple(plan.lines()))


def _ram_gb() -> float:
    import psutil

    return psutil.virtual_memory().available / 1e9
