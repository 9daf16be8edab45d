"""What the machine can run, and what to do where it cannot."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_vision_bridge import environment
from qwen_vision_bridge.environment import choose_family, inspect_machine
from qwen_vision_bridge.extractor import VisionCacheExtractor
from qwen_vision_bridge.loading.memory import plan_for, resolve_device, resolve_dtype
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

QWEN = FAMILIES["qwen"]


def gpu(total: float) -> list[tuple[str, float, float]]:
    return [("Some GPU", total, total)] if total else []


def test_this_machine_can_run_the_miniature() -> None:
    report = inspect_machine()
    assert report.ok
    assert report.as_dict()["families"][0]["family"] == "miniature"
    assert {"Python", "torch", "diffusers", "memory"} <= {check.name for check in report.checks}


@pytest.mark.parametrize(
    ("forbidden", "compiled", "noted"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_packages_compiled_at_every_start_are_noted(
    forbidden: bool, compiled: bool, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "torch.pyc"
    if compiled:
        cached.touch()
    monkeypatch.setattr(environment, "find_spec", lambda name: SimpleNamespace(cached=str(cached)))
    monkeypatch.setattr(environment.sys, "dont_write_bytecode", forbidden)
    report = inspect_machine()
    remedies = {check.name: check.remedy for check in report.checks if not check.ok}
    assert report.ok  # slow is no failure
    assert ("--compile-bytecode" in remedies.get("bytecode", "")) == noted


@pytest.mark.parametrize(
    ("gpu_gb", "mode"),
    [
        (80, "plain"),
        (48, "8-bit"),
        (32, "8-bit + model offload"),
        (26, "4-bit"),
        (24, "4-bit + model offload"),
        (12, "4-bit + group offload"),
        (7, "sequential offload"),
        (4, None),
    ],
)
def test_the_preferred_mode_that_fits_is_recommended(gpu_gb: float, mode: str | None) -> None:
    plan = plan_for(QWEN, gpu_gb, ram_gb=128)
    assert (plan.mode.name if plan else None) == mode


def test_offload_needs_the_weights_to_fit_in_cpu_memory() -> None:
    assert plan_for(QWEN, 12, ram_gb=16) is None
    plan = plan_for(QWEN, 24, ram_gb=24)
    assert plan is not None
    assert plan.mode.name == "4-bit + model offload"


@pytest.mark.parametrize(("gpu_gb", "family"), [(80, "qwen"), (4, "miniature"), (0, "miniature")])
def test_auto_takes_the_released_models_where_they_fit(
    gpu_gb: float, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "gpu_memory_gb", lambda: gpu(gpu_gb))
    monkeypatch.setattr(environment, "_ram_gb", lambda: 128.0)
    name, line = choose_family("auto")
    other = {"qwen": "miniature", "miniature": "qwen"}[family]
    assert name == family
    assert f"--models {other}" in line
    assert "\n" not in line


def test_a_family_that_was_asked_for_is_taken() -> None:
    assert choose_family("qwen")[0] == "qwen"
    with pytest.raises(ValueError, match="auto or one of miniature, qwen"):
        choose_family("huge")


def test_a_missing_package_fails_the_report_and_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "diffusers":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "torch" else real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    report = inspect_machine()
    failed = {check.name: check.remedy for check in report.checks if not check.ok}
    assert not report.ok
    assert set(failed) == {"diffusers", "torch"}
    assert "uv sync" in failed["torch"]


def test_too_little_memory_fails_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_ram_gb", lambda: 0.5)
    report = inspect_machine()
    assert not report.ok
    assert any("close other programs" in check.remedy for check in report.checks if not check.ok)


@pytest.mark.parametrize(
    ("dtype", "resolved"),
    [
        (None, torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("torch.float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_have_names(dtype: torch.dtype | str | None, resolved: torch.dtype) -> None:
    assert resolve_dtype(dtype, torch.device("cpu")) == resolved


@pytest.mark.parametrize("dtype", ["int8", "half", torch.float64, torch.int64])
def test_other_dtypes_are_refused_with_the_names(dtype: torch.dtype | str) -> None:
    with pytest.raises(ValueError, match="dtype is one of bf16, fp16, fp32"):
        resolve_dtype(dtype, torch.device("cpu"))


@pytest.mark.parametrize("device", ["mps", "bf16", "gpu", "meta"])
def test_other_devices_are_refused_before_any_work(device: str) -> None:
    for create in (EnhancedQwenImageEdit, VisionCacheExtractor):
        with pytest.raises(ValueError, match=f'device is "cpu".*{device}'):
            create("miniature", device=device)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r'has 1 CUDA.*family="miniature"'):
        resolve_device("cuda:1")


def test_notebooks_and_scripts_choose_a_family_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environment, "gpu_memory_gb", lambda: [])
    assert VisionCacheExtractor().family.name == choose_family("auto")[0] == "miniature"
    assert "--models qwen takes the released models" in caplog.text
