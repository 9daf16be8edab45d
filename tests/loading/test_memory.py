"""Plans say what lies where; running out of memory in any stage is one line, and the next edit works."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import check_environment
from qwen_vision_bridge import pipeline as pipeline_module
from qwen_vision_bridge.loading.memory import (
    CARDS_GB,
    MEMORY_MODES,
    GpuMemoryError,
    MemoryPlan,
    device_name,
    find_mode,
    free_gpu_gb,
    is_out_of_memory,
    out_of_memory_as,
    plan_for,
    smaller_mode_suggested,
    total_gpu_gb,
)
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from tests.conftest import SMALL

QWEN = FAMILIES["qwen"]
SHORT = {"prompt": "make it blue", "num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": None}
STAGES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "source tower": lambda editor: (editor.extractor, "_run_source"),
    "target tower": lambda editor: (editor.pipe.text_encoder.model.visual, "forward"),
    "language model": lambda editor: (editor.pipe.text_encoder.model.language_model, "forward"),
    "bridge": lambda editor: (editor.bridge, "contributions"),
    "VAE encoding": lambda editor: (editor.pipe.vae, "encode"),
    "transformer": lambda editor: (editor.pipe.transformer, "forward"),
    "VAE decoding": lambda editor: (editor.pipe.vae, "decode"),
}


@pytest.fixture(scope="module")
def expected(shared_pipe: Any, photo: Image.Image) -> np.ndarray:
    """The edit of an editor that never ran out of memory."""
    editor = EnhancedQwenImageEdit(SMALL, "random", pipe=shared_pipe, feature_cache=False)
    return np.asarray(editor.generate(photo, **SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_is_one_line_and_the_next_edit_works(
    stage: str, pipe: Any, photo: Image.Image, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = EnhancedQwenImageEdit(SMALL, "random", pipe=pipe, feature_cache=False)
    held: list[Any] = []

    def exhausted(*_: Any, **__: Any) -> None:
        work = torch.zeros(8)  # what a failing stage leaves in its frame
        held.append(weakref.ref(work))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    owner, name = STAGES[stage](editor)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, exhausted)
        with pytest.raises(GpuMemoryError) as caught:
            editor.generate(photo, **SHORT)
    message = str(caught.value)
    assert "\n" not in message
    assert "8-bit (load_in_8bit=True)" in message
    assert held
    gc.collect()
    assert held[0]() is None  # although the error is still here
    assert np.array_equal(np.asarray(editor.generate(photo, **SHORT)), expected)


def test_out_of_memory_while_loading_leaves_loading_possible(
    pipe: Any, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = EnhancedQwenImageEdit(SMALL, "fresh", feature_cache=False)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline_module, "load_pipeline", exhausted)
    with pytest.raises(GpuMemoryError, match="mode plain; this needs less"):
        editor.generate(photo, **SHORT)
    monkeypatch.setattr(pipeline_module, "load_pipeline", lambda *_: pipe)
    assert editor.generate(photo, **SHORT).size


def test_offloaded_models_are_taken_off_the_gpu_after_a_failure(
    pipe: Any, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers does that at the end of a call that ends well."""
    editor = EnhancedQwenImageEdit(SMALL, "fresh", pipe=pipe, feature_cache=False)
    freed: list[int] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.transformer, "forward", exhausted)
    with pytest.raises(GpuMemoryError):
        editor.generate(photo, **SHORT)
    assert freed == [1]


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="planted"), out_of_memory_as(lambda: "never"):
        raise RuntimeError("planted")


def test_a_cap_on_the_processs_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB with 60 free, of which 5 are reserved by this process, capped at 24."""
    for name, value in (("mem_get_info", (60e9, 80e9)), ("memory_reserved", 5e9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for fraction, free, card in ((1.0, 60, 80), (0.3, 19, 24)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, f=fraction: f)
        device = torch.device("cuda")
        assert (free_gpu_gb(device), total_gpu_gb(device)) == pytest.approx((free, card))
    assert (free_gpu_gb(torch.device("cpu")), total_gpu_gb(torch.device("cpu"))) == (None, 0)


def test_a_device_is_named_by_its_card_or_by_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 on {device}")
    assert device_name("cuda:1") == "NVIDIA H100 on cuda:1"
    for count, name in ((1, "CPU, 1 thread"), (2, "CPU, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert device_name(torch.device("cpu")) == name
        assert device_name("cpu", threads=False) == "CPU"


def test_the_smallest_mode_says_that_there_is_no_smaller_one() -> None:
    smallest = min(MEMORY_MODES, key=lambda mode: mode.peak_gb(QWEN.editor))
    with pytest.raises(GpuMemoryError, match="the smallest there is"):  # noqa: SIM117
        with smaller_mode_suggested(smallest, QWEN.editor):
            raise torch.OutOfMemoryError("x")


@pytest.mark.parametrize(
    ("card", "mode"),
    [
        (80, "plain"),
        (48, "8-bit"),
        (24, "4-bit + model offload"),
        (16, "4-bit + group offload"),
        (12, "4-bit + group offload"),
    ],
)
def test_every_card_has_a_plan_whose_need_fits(card: int, mode: str) -> None:
    assert card in CARDS_GB
    plan = plan_for(QWEN, card, ram_gb=64)
    assert plan is not None
    assert plan.mode.name == mode
    assert plan.peak_gb <= card
    assert plan.keeps_source == (card >= 48)
    text = "\n".join(plan.lines())
    for part in ("source tower", "text encoder", "transformer", "working space", f"for {card} GB", mode):
        assert part in text
    assert ("then freed" in text) == (not plan.keeps_source)


def test_without_memory_there_is_no_plan() -> None:
    assert plan_for(QWEN, 4, ram_gb=64) is None
    assert plan_for(QWEN, 12, ram_gb=8) is None  # what is offloaded has to lie somewhere


def test_every_mode_has_a_name_of_its_own_and_is_found() -> None:
    assert len({mode.name for mode in MEMORY_MODES}) == len(MEMORY_MODES)
    for mode in MEMORY_MODES:
        assert find_mode(mode.bits == 8, mode.bits == 4, mode.offload) is mode


def test_the_source_stays_only_where_nothing_is_offloaded() -> None:
    for mode in MEMORY_MODES:
        roomy = MemoryPlan(mode, QWEN, 200.0)
        assert roomy.keeps_source == (mode.offload is None)
        assert not MemoryPlan(mode, QWEN, mode.peak_gb(QWEN.editor) + 0.5).keeps_source


def test_check_environment_plans_for_a_card_that_is_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vision_bridge.environment._ram_gb", lambda: 64.0)
    monkeypatch.setattr("qwen_vision_bridge.environment._disk", lambda: [])
    assert check_environment.main(["--gpu-memory", "24"]) == 0
    printed = capsys.readouterr().out
    assert "Memory plan for 24 GB: 4-bit + model offload" in printed
    assert "text encoder     7.3 GB, 4-bit (its tower bf16), in CPU memory" in printed


def test_a_script_says_out_of_memory_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_vision_bridge.cli import run

    def exhausted(_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        run(exhausted)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
