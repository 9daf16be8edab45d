"""LoRAs in edits: alike with a bridge and without, in every key, in arms, and in few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vision_bridge import EnhancedQwenImageEdit
from qwen_vision_bridge.evaluation.arms import Arm, parse_arm
from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
from qwen_vision_bridge.evaluation.tasks import Run, content_key
from qwen_vision_bridge.io import digest_of
from qwen_vision_bridge.loading.families import with_few_steps
from qwen_vision_bridge.loading.registry import EDITORS, FAMILIES
from qwen_vision_bridge.synthetic.cases import make_cases
from tests.conftest import SMALL

PROMPT = "make the suit blue"
SHORT = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": None}


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random LoRA for the miniature's transformer, or its text encoder."""
    folder = tmp_path_factory.mktemp("loras")

    def write(name: str = "style", seed: int = 0, component: str = "transformer") -> Path:
        generator = torch.Generator().manual_seed(seed)
        layer, size = "transformer_blocks.0.attn.to_q", 192
        if component == "text_encoder":
            layer, size = "text_encoder.model.language_model.layers.0.self_attn.o_proj", 224
        tensors = {
            f"{layer}.lora_A.weight": torch.randn(2, size, generator=generator),
            f"{layer}.lora_B.weight": 0.1 * torch.randn(size, 2, generator=generator),
        }
        save_file(tensors, folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"

    return write


@pytest.fixture
def edited(editor: Any, photo: Image.Image) -> Iterator[Callable[..., np.ndarray]]:
    """Short edits of a photograph as arrays; no LoRA is left afterwards."""

    def edit(enhanced: bool = False, **options: Any) -> np.ndarray:
        return np.asarray(editor.generate(photo, PROMPT, enhanced, **{**SHORT, **options}))

    yield edit
    editor.unload_lora()


def test_a_lora_acts_the_same_without_a_bridges_effect(
    editor: Any, photo: Image.Image, edited: Callable[..., np.ndarray], lora_file: Callable[..., Path]
) -> None:
    """A fresh bridge and strength 0 give the LoRA's own image, unloading gives the stock one: bit for bit."""
    stock, bridged = edited(), edited(True)
    name = editor.load_lora(lora_file())
    alone = edited()
    assert not np.array_equal(alone, stock)
    assert np.array_equal(edited(True, strength=0.0), alone)
    assert not np.array_equal(edited(True), alone)
    fresh = EnhancedQwenImageEdit(SMALL, bridge="fresh", pipe=editor.pipe, dtype=torch.float32)
    assert np.array_equal(np.asarray(fresh.generate(photo, PROMPT, **SHORT)), alone)
    editor.set_lora(name, 0.5)
    assert editor.loras == {"style": 0.5}
    assert not np.array_equal(edited(), alone)
    editor.set_lora(name, 0)
    assert np.array_equal(edited(), stock)
    editor.unload_lora(name)
    assert np.array_equal(edited(), stock)
    assert np.array_equal(edited(True), bridged)


def test_everything_about_a_lora_is_in_the_key(
    editor: Any, edited: Callable[..., np.ndarray], lora_file: Callable[..., Path]
) -> None:
    """Name, weight, tensors, the text encoder's part; and the same LoRA again has the same key."""
    keys = {"stock": digest_of(editor.fingerprint(False))}
    editor.load_lora(lora_file())
    keys["loaded"] = digest_of(editor.fingerprint(False))
    editor.set_lora("style", 0.5)
    keys["weight"] = digest_of(editor.fingerprint(False))
    editor.unload_lora("style")
    editor.load_lora(lora_file(), name="other")
    keys["name"] = digest_of(editor.fingerprint(False))
    editor.unload_lora("other")
    editor.load_lora(lora_file("changed", seed=1), name="style")
    keys["tensors"] = digest_of(editor.fingerprint(False))
    editor.unload_lora()
    editor.load_lora(lora_file("encoder", component="text_encoder"), name="style")
    keys["encoder"] = digest_of(editor.fingerprint(False))
    editor.unload_lora()
    assert len(set(keys.values())) == len(keys), keys
    assert digest_of(editor.fingerprint(False)) == keys["stock"]
    editor.load_lora(lora_file())
    assert digest_of(editor.fingerprint(False)) == keys["loaded"]
    assert editor.fingerprint(False)["adapters"]["style"]["weight"] == 1.0


def test_steps_and_guidance_are_in_the_key_of_an_image(editor: Any, tmp_path: Path) -> None:
    case = make_cases("space", 1)[0]
    arm = Arm("baseline")

    def key(family: Any = SMALL, **options: Any) -> str:
        editor.family = family
        run = Run(editor, tmp_path, [arm], 0, options, {case.case_id: case})
        return content_key(run, case, arm, False)

    keys = [
        key(),
        key(num_inference_steps=4),
        key(true_cfg_scale=1.0),
        key(negative_prompt="dark"),
        key(with_few_steps(SMALL, 4)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_few_steps_load_their_lora_and_scheduler(pipe: Any, photo: Image.Image) -> None:
    """Four passes through the transformer, in both arms; the shift is 3 at every size, down to no noise."""
    own = EnhancedQwenImageEdit(SMALL, bridge="random", fast=4)
    calls: list[int] = []
    hook = own.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    own.pipe.set_progress_bar_config(disable=True)
    baseline, enhanced, _ = own.compare(photo, PROMPT)
    hook.remove()
    assert len(calls) == 8
    assert not np.array_equal(np.asarray(baseline), np.asarray(enhanced))
    assert own.loras == {}  # merged into the weights
    sigmas = own.pipe.scheduler.sigmas.tolist()
    assert sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert own.pipe.scheduler.config.max_shift == pytest.approx(math.log(3))
    assert own.family.negative_prompt is None
    loaded = own.fingerprint(False)
    assert loaded == EnhancedQwenImageEdit(SMALL, bridge="random", fast=4).fingerprint(False)
    assert loaded["few_steps"] is not None


def test_merging_few_steps_moves_no_image(editor: Any, edited: Callable[..., np.ndarray]) -> None:
    """A LoRA beside the weights and the same one in them give the same pixels, but for rounding."""
    own = EnhancedQwenImageEdit(SMALL, bridge="random")
    own.pipe.set_progress_bar_config(disable=True)
    photo = Image.fromarray(edited())
    file = dict(EDITORS["miniature-editor"].few_steps)[4]
    stock = np.asarray(own.generate(photo, PROMPT, False, **SHORT)).astype(int)
    own.load_lora(file, name="few-steps")
    with pytest.raises(ValueError, match="fast="):
        own.unload_lora("few-steps")
    beside = np.asarray(own.generate(photo, PROMPT, False, **SHORT)).astype(int)
    assert own.lora_set.merge("few-steps")
    assert own.loras == {}
    merged = np.asarray(own.generate(photo, PROMPT, False, **SHORT)).astype(int)
    assert np.abs(merged - beside).max() <= 1
    assert np.abs(merged - stock).max() > 8
    assert own.fingerprint(False)["changes"].keys() == {"transformer"}


def test_quantised_weights_keep_a_lora_beside_them(lora_file: Callable[..., Path]) -> None:
    own = EnhancedQwenImageEdit(SMALL, bridge="random")
    name = own.load_lora(lora_file())

    class Quantised(torch.nn.Linear):
        """Stands for a layer of bitsandbytes."""

    layer = own.pipe.transformer.transformer_blocks[0].attn.to_q
    layer.base_layer.__class__ = Quantised
    assert not own.lora_set.merge(name)
    assert own.loras == {name: 1.0}


def test_few_steps_need_a_lora_for_that_many() -> None:
    with pytest.raises(ValueError, match=r"no LoRA for 8 steps \(there is: 4\)"):
        EnhancedQwenImageEdit("miniature", bridge="fresh", fast=8)
    family = with_few_steps(FAMILIES["miniature"], 8, "mine.safetensors")
    assert (family.steps, family.true_cfg_scale, family.editor.few_step_lora) == (8, 1.0, "mine.safetensors")
    for name, release in (("Qwen-Image-Edit-2509", "-2509"), ("Qwen-Image-Edit-2511", "-2511")):
        for steps, location in EDITORS[name].few_steps:
            assert location.startswith("lightx2v/Qwen-Image-")
            assert location.endswith(f"Edit{release}-Lightning-{steps}steps-V1.0-bf16.safetensors")
        assert dict(EDITORS[name].few_steps).keys() == {4, 8}


def test_the_shipped_lora_is_for_every_block_and_small() -> None:
    from qwen_vision_bridge.loading.lora_files import find_lora

    file = find_lora(dict(EDITORS["miniature-editor"].few_steps)[4])
    assert file.stat().st_size <= 3e6
    tensors = load_file(file)
    blocks = {key.split(".")[2] for key in tensors}
    assert blocks == {str(number) for number in range(7)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_arm_with_a_lora_leaves_the_others_alone(
    editor: Any, lora_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Its images differ, the baseline's are those of a run without it, and nothing stays loaded."""
    cases = make_cases("space", 1)
    file = lora_file("arms", seed=3)
    arms = [Arm("baseline"), parse_arm(f"lora=none,lora={file}:0.8", SMALL)]
    arms += [parse_arm(f"both=random,lora={file}:0.8,strength=0", SMALL)]
    assert arms[1].loras == ((str(file), 0.8),)
    options = EvaluationOptions(edits=True)
    result = evaluate(editor, cases, tmp_path / "a", arms, perception=False, options=options, **SHORT)
    assert result is not None
    pixels = {arm: np.asarray(Image.open(tmp_path / "a" / r["image"])) for arm, r in _by_arm(result).items()}
    assert len(pixels) == 3
    assert not np.array_equal(pixels["baseline"], pixels["lora"])
    assert np.array_equal(pixels["lora"], pixels["both"])
    assert editor.loras == {}
    alone = evaluate(editor, cases, tmp_path / "b", arms[:1], perception=False, options=options, **SHORT)
    assert alone is not None
    assert _by_arm(alone)["baseline"]["key"] == _by_arm(result)["baseline"]["key"]
    again = evaluate(editor, cases, tmp_path / "a", arms, perception=False, options=options, **SHORT)
    assert again is not None
    assert again.done_before == 3


def test_wrong_arms_with_loras_are_refused(lora_file: Callable[..., Path]) -> None:
    file = lora_file()
    for text, says in (
        ("x=none", "NAME=none,lora="),
        (f"x=none,strength=1,lora={file}", "NAME=none,lora="),
        (f"x=fresh,lora={file},lora={file}", "one LoRA twice"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_arm(text, SMALL)
    with pytest.raises(FileNotFoundError, match="absent"):
        parse_arm("x=none,lora=absent.safetensors", SMALL)


def test_a_wrong_lora_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    own = EnhancedQwenImageEdit("miniature", bridge="fresh")
    with pytest.raises(FileNotFoundError, match="absent"):
        own.load_lora(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="weight"):
        own.load_lora(tmp_path / "absent.safetensors", float("nan"))
    assert own._pipe is None


def _by_arm(result: Any) -> dict[str, Any]:
    return {record["arm"]: record for record in result.records if record["level"] == "edit"}
