"""Whatever a user changes on a loaded pipeline is another key; what is put back is the old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from torch import nn

from qwen_vision_bridge import EnhancedQwenImageEdit
from qwen_vision_bridge.io import digest_of
from qwen_vision_bridge.loading.fingerprint import changed_parts, loaded_state, weights_digest
from qwen_vision_bridge.loading.memory import MEMORY_MODES, MemoryMode
from tests.conftest import SMALL

LORA = {"r": 2, "lora_alpha": 2, "init_lora_weights": False}
PROMPT, SHORT = (
    "make the suit blue",
    {"num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": None},
)


@pytest.fixture(scope="module")
def own_editor() -> EnhancedQwenImageEdit:
    """A pipeline of this module's own, for it is changed for good."""
    editor = EnhancedQwenImageEdit(SMALL, bridge="random")
    editor.pipe.set_progress_bar_config(disable=True)
    return editor


def add_lora(model: Any, target: str, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(target_modules=[target], **LORA), adapter_name="style")


def change_scheduler(pipe: Any) -> None:
    settings = {**pipe.scheduler.config, "shift_terminal": None, "base_shift": 1.1}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)


def one_weight(module: nn.Module) -> None:
    """The smallest change there is: the last bit of one value."""
    weight = next(parameter for parameter in module.parameters() if parameter.ndim == 2)
    weight.data[-1, -1] = torch.nextafter(weight.data[-1, -1], torch.tensor(9.0, device=weight.device))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scheduler": change_scheduler,
    "a LoRA on the DiT": lambda pipe: add_lora(pipe.transformer, "to_q"),
    "its weights": lambda pipe: one_weight(pipe.transformer.transformer_blocks[0].attn.to_q.lora_B["style"]),
    "its scale": lambda pipe: pipe.set_adapters(["style"], [0.3]),
    "it is off": lambda pipe: pipe.transformer.disable_adapters(),
    "a LoRA on the text encoder": lambda pipe: add_lora(pipe.text_encoder, "q_proj"),
    "a weight of the DiT": lambda pipe: one_weight(pipe.transformer.transformer_blocks[1].img_mlp),
    "a weight of the target tower": lambda pipe: one_weight(pipe.text_encoder.model.visual.merger),
    "rows of a table exchanged": lambda pipe: (
        pipe.text_encoder.get_input_embeddings()
        .weight.data[:2]
        .copy_(pipe.text_encoder.get_input_embeddings().weight.data[:2].flip(0).clone())
    ),
    "the VAE's tiling": lambda pipe: pipe.vae.enable_tiling(),
    "the prompt template": lambda pipe: setattr(pipe, "prompt_template_encode", "{}"),
    "a hook": lambda pipe: pipe.transformer.register_forward_hook(lambda *_: None),
    "the processor": lambda pipe: setattr(pipe.processor.image_processor, "image_mean", [0.4] * 3),
    "a new token": lambda pipe: pipe.tokenizer.add_tokens(["<new>"]),
}


def test_everything_a_user_can_change_changes_the_key() -> None:
    """One change after the other on one pipeline: every state has a key of its own."""
    editor = EnhancedQwenImageEdit(SMALL, bridge="random")
    unloaded = digest_of(editor.fingerprint(False))
    _ = editor.pipe
    assert digest_of(editor.fingerprint(False)) == unloaded
    keys = {"as loaded": unloaded}
    for name, change in CHANGES.items():
        change(editor.pipe)
        keys[name] = digest_of(editor.fingerprint(False))
    assert len(set(keys.values())) == len(keys), keys
    editor.options = replace(editor.options, mrope="stock")
    assert digest_of(editor.fingerprint(False)) not in keys.values()


def test_sizes_set_in_diffusers_itself_are_in_the_key(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_vision_bridge.loading.registry import EDITORS
    from qwen_vision_bridge.patches import effective_sizes

    released = EDITORS["Qwen-Image-Edit-2509"]
    before = effective_sizes(type(pipe), released)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 512 * 512)
    assert effective_sizes(type(pipe), released) == [512 * 512, *before[1:]]


def test_changes_put_back_give_the_first_key_again(own_editor: EnhancedQwenImageEdit) -> None:
    pipe, before = own_editor.pipe, own_editor.fingerprint(True)
    assert before["changes"] == {}
    scheduler = pipe.scheduler
    change_scheduler(pipe)
    add_lora(pipe.transformer, "to_q")
    assert set(own_editor.fingerprint(True)["changes"]) == {"scheduler", "transformer"}
    pipe.scheduler = scheduler
    pipe.unload_lora_weights()
    assert own_editor.fingerprint(True) == before


def test_an_edit_leaves_the_key_as_it_was(own_editor: EnhancedQwenImageEdit, photo: Image.Image) -> None:
    before = own_editor.fingerprint(True)
    own_editor.compare(photo, PROMPT, **SHORT)
    assert own_editor.fingerprint(True) == before


def test_a_given_pipeline_is_known_by_its_content(pipe: Any) -> None:
    """Nothing says that it is what the family's editor holds."""
    editor = EnhancedQwenImageEdit(SMALL, pipe=pipe)
    assert set(editor.fingerprint(False)["changes"]) == {"pipeline", *pipe.components}


def test_weights_under_sequential_offload_are_still_read() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    digest = weights_digest(plain)
    assert weights_digest(cpu_offload(plain, execution_device="cpu")) == digest
    assert weights_digest(nn.Linear(2, 2, device="meta")) != weights_digest(nn.Linear(2, 2, device="meta"))


def test_equal_pipelines_have_equal_states(own_editor: EnhancedQwenImageEdit) -> None:
    other = EnhancedQwenImageEdit(SMALL, bridge="fresh")
    assert loaded_state(other.pipe) == loaded_state(own_editor.pipe)
    assert changed_parts(other.pipe, loaded_state(own_editor.pipe)) == {}


@pytest.mark.slow
def test_benchmark_never_returns_images_of_another_pipeline(
    own_editor: EnhancedQwenImageEdit, photo: Image.Image, tmp_path: Path
) -> None:
    pipe, scheduler = own_editor.pipe, own_editor.pipe.scheduler

    def kept_and_live() -> tuple[np.ndarray, np.ndarray]:
        (record,) = own_editor.benchmark([photo], [PROMPT], tmp_path, **SHORT)
        live = own_editor.generate(photo, PROMPT, use_qwen3_vision=False, **SHORT)
        return np.asarray(Image.open(tmp_path / record["files"]["baseline"])), np.asarray(live)

    seen = []
    for change in (lambda: None, lambda: change_scheduler(pipe), lambda: add_lora(pipe.transformer, "to_q")):
        change()
        kept, live = kept_and_live()
        assert np.array_equal(kept, live)
        seen.append(live.tobytes())
    assert len(set(seen)) == 3
    pipe.unload_lora_weights()
    pipe.scheduler = scheduler


def test_keys_refuse_what_they_cannot_hold(editor: Any, photo: Image.Image, tmp_path: Path) -> None:
    for value in (print, torch.zeros(3), np.zeros(3)):
        with pytest.raises(TypeError):
            digest_of([value])
    with pytest.raises(TypeError):
        editor.benchmark([photo], [PROMPT], tmp_path, callback_on_step_end=print, **SHORT)
    assert not list(tmp_path.iterdir())


def test_results_of_another_kind_are_not_overwritten(editor: Any, photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"records": {}}')
    with pytest.raises(ValueError, match=r"results\.json"):
        editor.benchmark([photo], [PROMPT], tmp_path, **SHORT)
    assert (tmp_path / "results.json").read_text() == '{"records": {}}'


def test_an_older_version_of_the_key_is_another_key(editor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = editor.fingerprint(True)
    monkeypatch.setattr("qwen_vision_bridge.pipeline.KEY_VERSION", 1)
    assert digest_of(editor.fingerprint(True)) != digest_of(before)


def test_a_bridge_with_another_clamp_has_another_digest() -> None:
    from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge, bridge_digest

    shapes = {"source_dim": 8, "target_dim": 6, "rank": 4, "query_dim": 4, "heads": 2}
    changes = ({}, {"clamp": 2.0}, {"heads": 4}, {"levels": ("late", "mid", "early")})
    bridges = [VisionBridge(BridgeConfig(**(shapes | change))) for change in changes]
    assert len({bridge_digest(bridge) for bridge in bridges}) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MEMORY_MODES, ids=lambda mode: mode.name)
def test_a_memory_mode_loads_strictly_and_keeps_its_key(mode: MemoryMode, photo: Image.Image) -> None:
    """Offloading and quantisation change nothing that the key covers; a changed weight does."""
    arguments = {"load_in_8bit": mode.bits == 8, "load_in_4bit": mode.bits == 4, "offload": mode.offload}
    editor = EnhancedQwenImageEdit(SMALL, "random", device="cuda", **arguments)
    _ = editor.pipe
    before = editor.fingerprint(True)
    assert before["changes"] == {}
    baseline = editor.generate(photo, PROMPT, use_qwen3_vision=False, **SHORT)
    assert editor.generate(photo, PROMPT, strength=0.0, **SHORT).tobytes() == baseline.tobytes()
    assert editor.generate(photo, PROMPT, **SHORT).tobytes() != baseline.tobytes()
    assert editor.fingerprint(True) == before
    weight = next(weight for weight in editor.pipe.transformer.parameters() if weight.ndim == 2)
    if not weight.is_meta:  # under sequential offloading the weights lie in accelerate's hooks
        weight.data[0, 0] += 1
        assert set(editor.fingerprint(True)["changes"]) == {"transformer"}
