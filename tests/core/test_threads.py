"""Calls from several threads give what they give alone, and leave the process as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus
import psutil
import pytest
import torch
from PIL import Image
from torch import nn

from qwen_vision_bridge import EnhancedQwenImageEdit, VisionBridge, VisionCacheExtractor
from qwen_vision_bridge.loading.locks import replaced
from qwen_vision_bridge.synthetic.cases import sample_image
from tests.conftest import SMALL

PROMPT = 'Change the text to "FOX".'
SHORT = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": None, "height": 64, "width": 64}
THREADS = 4
TINY = replace(SMALL, editor=replace(SMALL.editor, vae_area=32 * 32))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [sample_image(128, seed) for seed in range(3)]


def global_state(pipe: Any) -> dict[str, Any]:
    """Everything global that a call touches and must put back."""
    modules = [
        module
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
    ]
    return {
        "hooks": [(*module._forward_hooks, *module._forward_pre_hooks) for module in modules],
        "replaced methods": [sorted(vars(module).keys() & {"forward"}) for module in modules],
        "pipeline attributes": sorted(vars(pipe)),
        "attention": pipe.text_encoder.model.visual.config._attn_implementation,
        "slicing": pipe.vae.use_slicing,
        "constants": (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE, plus.calculate_dimensions),
        "torch": (nn.Module.register_parameter, nn.Module.register_buffer, nn.Linear(2, 2).weight.device),
    }


def run(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.slow
def test_a_shared_pipeline_edits_the_same_in_threads(editor: Any, images: list[Image.Image]) -> None:
    def edit(number: int) -> bytes:
        return editor.generate(images[number % 3], PROMPT, seed=number % 3, **SHORT).tobytes()

    alone = [edit(number) for number in range(3)]
    before = global_state(editor.pipe)
    assert run(9, edit) == alone * 3
    assert global_state(editor.pipe) == before


@pytest.mark.slow
def test_pipelines_loaded_in_threads_edit_as_one_alone(images: list[Image.Image]) -> None:
    """Each thread loads a pipeline and a bridge of its own while the others load and edit."""

    def edit(number: int) -> bytes:
        pipeline = EnhancedQwenImageEdit(SMALL, "random", feature_cache=False)
        assert {weight.device.type for weight in pipeline.bridge.parameters()} <= {"cpu", "cuda"}
        return pipeline.generate(images[number % 3], PROMPT, seed=0, **SHORT).tobytes()

    alone = [edit(number) for number in range(3)]
    assert run(6, edit) == alone * 2
    assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("shared", [True, False])
def test_extractors_give_the_same_features_in_threads(shared: bool, images: list[Image.Image]) -> None:
    one = VisionCacheExtractor("miniature", feature_cache=False)

    def features(number: int) -> list[torch.Tensor]:
        extractor = one if shared else VisionCacheExtractor("miniature", feature_cache=False)
        extract = extractor.extract_qwen3_vision if number % 3 else extractor.extract_qwen25_vision
        return list(extract(images[number % 3]).features.values())

    alone = [features(number) for number in range(3)]
    for number, found in enumerate(run(9, features)):
        assert all(map(torch.equal, found, alone[number % 3]))


def test_bridges_made_while_a_model_loads_hold_weights() -> None:
    def make(number: int) -> str:
        if number % 2:
            return next(VisionBridge().parameters()).device.type
        VisionCacheExtractor("miniature", feature_cache=False).warm("qwen3")
        return "cpu"

    assert set(run(8, make)) == {"cpu"}


@pytest.mark.slow
def test_batched_edits_in_threads_are_those_of_one(editor: Any, images: list[Image.Image]) -> None:
    def edit(number: int) -> list[bytes]:
        prepared = [
            editor.prepare(
                replace(editor.check_edit(images[number % 3], PROMPT, seed, **SHORT), bridge=editor.bridge)
            )
            for seed in range(2)
        ]
        return [image.tobytes() for image in editor.denoise(prepared)]

    alone = [edit(number) for number in range(3)]
    assert run(6, edit) == alone * 2


def test_the_source_stays_while_any_thread_keeps_it(pipe: Any, images: list[Image.Image]) -> None:
    editor = EnhancedQwenImageEdit(SMALL, pipe=pipe, keep_source=False, feature_cache=False)
    with editor.keeping_source():
        with editor.keeping_source():
            editor.extract_source([images[0]])
        editor.extract_source([images[1]])
        assert editor.extractor._qwen3_model is not None
    assert editor.extractor._qwen3_model is None


def test_replaced_attributes_come_back_as_they_were() -> None:
    class Owner:
        own = "of the class"

    owner = Owner()
    with replaced(owner, own="inside"):
        assert owner.own == "inside"
    assert vars(owner) == {}
    owner.own = "of the user"
    with pytest.raises(ZeroDivisionError), replaced(owner, own="inside"):
        raise ZeroDivisionError
    assert owner.own == "of the user"


@pytest.mark.slow
def test_200_edits_with_errors_leave_the_process_stock(pipe: Any, images: list[Image.Image]) -> None:
    """Four threads, every fifth edit ended by an exception at another place; as small as edits get."""
    editor = EnhancedQwenImageEdit(TINY, "random", pipe=pipe, dtype=torch.float32)
    smallest = {**SHORT, "height": 32, "width": 32, "output_type": "latent"}

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("injected")

    def edit(number: int) -> bytes | None:
        seed, options = number % 3, dict(smallest)
        if number % 5:
            return editor.generate(images[seed], PROMPT, seed=seed, **options).numpy().tobytes()
        if number % 10:
            options["callback_on_step_end"] = fail
        edit = replace(editor.check_edit(images[seed], PROMPT, seed, **options), bridge=editor.bridge)
        with pytest.raises(ZeroDivisionError):
            editor.edit(edit if number % 10 else replace(edit, source=fail))
        return None

    alone = [edit(number) for number in (6, 1, 2)]
    before = global_state(editor.pipe)
    gc.collect()
    memory = psutil.Process().memory_info().rss
    edited = run(200, edit)
    gc.collect()
    grown = psutil.Process().memory_info().rss - memory
    assert [image for image in edited if image] == [alone[n % 3] for n in range(200) if n % 5]
    assert global_state(editor.pipe) == before
    assert grown < 100e6
    assert edit(1) == alone[1]
