"""Hooks: they fire for both prompts, give the right positions, tell when unread, and are gone afterwards."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import Any

import pytest
import torch
from PIL import Image

from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge
from qwen_vision_bridge.injection import SITES, FeaturesNotReadError, capture_vision, inject, replace_vision
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.patches import condition_grids, image_sizes, mrope_positions

FAMILY = FAMILIES["miniature"]


@pytest.fixture
def bridge() -> VisionBridge:
    return VisionBridge(BridgeConfig.for_family(FAMILY, init="random")).eval()


@pytest.fixture
def cache(editor: Any, photo: Image.Image) -> Any:
    return editor.extract_source([photo])


@pytest.fixture
def seen_by_tower(pipe: Any, photo: Image.Image) -> Image.Image:
    """The photograph at the pipeline's condition size."""
    with image_sizes(type(pipe), FAMILY.editor):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        size = module.calculate_dimensions(module.CONDITION_IMAGE_SIZE, photo.width / photo.height)
    return photo.resize(size)


@torch.no_grad()
def encode(pipe: Any, image: Image.Image, prompt: str = "make it red") -> torch.Tensor:
    return pipe.encode_prompt(prompt, image=[image])[0]


@pytest.mark.parametrize("site", SITES)
def test_a_random_bridge_changes_embeddings_strength_0_does_not(
    site: str, pipe: Any, bridge: VisionBridge, cache: Any, seen_by_tower: Image.Image
) -> None:
    stock = encode(pipe, seen_by_tower)
    with inject(pipe, bridge, cache, 1.0, site):
        changed = encode(pipe, seen_by_tower)
    with inject(pipe, bridge, cache, 0.0, site):
        unchanged = encode(pipe, seen_by_tower)
    assert (changed - stock).abs().mean() > 0.01 * stock.abs().mean()
    assert torch.equal(unchanged, stock)
    assert torch.equal(encode(pipe, seen_by_tower), stock)


@pytest.mark.parametrize("site", SITES)
def test_a_fresh_bridge_changes_nothing_at_any_site(
    site: str, pipe: Any, cache: Any, seen_by_tower: Image.Image
) -> None:
    stock = encode(pipe, seen_by_tower)
    with inject(pipe, VisionBridge(BridgeConfig.for_family(FAMILY)), cache, 1.0, site):
        assert torch.equal(encode(pipe, seen_by_tower), stock)


def test_the_sites_are_different_places(
    pipe: Any, bridge: VisionBridge, cache: Any, seen_by_tower: Any
) -> None:
    results = []
    for site in SITES:
        with inject(pipe, bridge, cache, 1.0, site):
            results.append(encode(pipe, seen_by_tower))
    results.append(encode(pipe, seen_by_tower))
    assert not any(torch.equal(*pair) for pair in itertools.combinations(results, 2))


def test_the_tower_site_feeds_the_bridges_output_to_the_lm(
    pipe: Any, bridge: VisionBridge, cache: Any, seen_by_tower: Image.Image
) -> None:
    """Against transformers' own way of giving features, without a hook."""
    if "mm_encoder_outputs" not in inspect.signature(type(pipe.text_encoder.model).forward).parameters:
        pytest.skip("this transformers takes no features in place of pixels")
    prompt = pipe.prompt_template_encode.format(
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>make it red"
    )
    inputs = pipe.processor(text=[prompt], images=[seen_by_tower], return_tensors="pt").to(pipe.device)
    model = pipe.text_encoder.model
    with torch.no_grad():
        vision = model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
        baseline = vision.pooler_output[0]
        bridge.to(baseline.device)
        vision.pooler_output = (bridge(cache.to(baseline.device).levels, baseline[None]).features[0],)
        expected = model(**inputs, mm_encoder_outputs={"image": vision}).last_hidden_state[:, 64:]
    with inject(pipe, bridge, cache), mrope_positions(pipe):
        assert torch.equal(encode(pipe, seen_by_tower), expected)


def test_both_prompts_read_the_features(editor: Any, photo: Image.Image, cache: Any) -> None:
    with inject(editor.pipe, editor.bridge, cache) as record:
        editor.generate(photo, "x", use_qwen3_vision=False, num_inference_steps=2)
    assert record.calls == 2
    assert torch.equal(record.baselines[0], record.baselines[1])


def test_features_that_were_never_read_are_an_error(pipe: Any, bridge: VisionBridge, cache: Any) -> None:
    with pytest.raises(FeaturesNotReadError, match="no enhanced image"), inject(pipe, bridge, cache):
        pass


def test_an_error_leaves_no_hook_and_is_not_replaced(
    pipe: Any, bridge: VisionBridge, cache: Any, seen_by_tower: Image.Image
) -> None:
    stock = encode(pipe, seen_by_tower)
    for site in SITES:
        with pytest.raises(ZeroDivisionError), inject(pipe, bridge, cache, 1.0, site), mrope_positions(pipe):
            raise ZeroDivisionError
    assert torch.equal(encode(pipe, seen_by_tower), stock)  # the `pipe` fixture looks for hooks as well


def test_features_for_another_grid_are_refused(
    pipe: Any, bridge: VisionBridge, editor: Any, photo: Any
) -> None:
    other = editor.extract_source([photo.resize((128, 128))])
    ((rows, columns),) = other.grids
    says = rf"grids \(\((\d+), (?!\1\))\d+\),\).*\(\({rows}, {columns}\),\)"  # it is no square
    with pytest.raises(ValueError, match=says), inject(pipe, bridge, other):
        encode(pipe, photo.resize((48, 16)))


def test_capturing_reads_without_changing(pipe: Any, editor: Any, seen_by_tower: Image.Image) -> None:
    stock = encode(pipe, seen_by_tower)
    with capture_vision(pipe) as record:
        assert torch.equal(encode(pipe, seen_by_tower), stock)
    ((rows, columns),) = editor.condition_grids([seen_by_tower])
    assert record.baselines[0].shape == (rows * columns, FAMILY.target.out_dim)


def test_replaced_vision_is_all_that_the_text_encoder_sees(pipe: Any, seen_by_tower: Image.Image) -> None:
    turned = seen_by_tower.rotate(180)
    with capture_vision(pipe) as other:
        of_turned = encode(pipe, turned)
    with replace_vision(pipe, other.baselines[0]):
        replaced = encode(pipe, seen_by_tower)
    assert torch.equal(replaced, of_turned)
    assert not torch.equal(encode(pipe, seen_by_tower), of_turned)
    with pytest.raises(ValueError, match="features are"), replace_vision(pipe, other.baselines[0][:-1]):
        encode(pipe, seen_by_tower)
    with pytest.raises(FeaturesNotReadError), replace_vision(pipe, other.baselines[0]):
        pass


def test_the_text_encoder_gets_three_axis_positions(pipe: Any, seen_by_tower: Image.Image) -> None:
    """Bit-equal to the encoder called with all that its processor makes, which the stock pipeline is not."""
    prompt = pipe.prompt_template_encode.format(
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>make it red"
    )
    inputs = pipe.processor(text=[prompt], images=[seen_by_tower], return_tensors="pt").to(pipe.device)
    with torch.no_grad():
        right = pipe.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1][:, 64:]
    with mrope_positions(pipe):
        assert torch.equal(encode(pipe, seen_by_tower), right)
    assert not torch.equal(encode(pipe, seen_by_tower), right), (
        "the installed diffusers passes positions itself now"
    )


def test_mrope_stock_leaves_the_pipeline_alone(pipe: Any, seen_by_tower: Image.Image) -> None:
    stock = encode(pipe, seen_by_tower)
    with mrope_positions(pipe, "stock"):
        assert torch.equal(encode(pipe, seen_by_tower), stock)
    with pytest.raises(ValueError, match='"fixed" or "stock"'), mrope_positions(pipe, "other"):
        pass


def test_token_types_that_are_given_already_are_left_alone(pipe: Any, seen_by_tower: Image.Image) -> None:
    prompt = pipe.prompt_template_encode.format("<|vision_start|><|image_pad|><|vision_end|>x")
    inputs = pipe.processor(text=[prompt], images=[seen_by_tower], return_tensors="pt").to(pipe.device)
    given = {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}
    with torch.no_grad():
        as_given = pipe.text_encoder(**given).logits
        with mrope_positions(pipe):
            assert torch.equal(pipe.text_encoder(**given).logits, as_given)


def test_positions_are_announced_once(
    pipe: Any, seen_by_tower: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from qwen_vision_bridge import patches

    patches._announced.clear()
    caplog.set_level(logging.INFO, "qwen_vision_bridge.patches")
    for _ in range(2):
        with mrope_positions(pipe):
            encode(pipe, seen_by_tower)
    assert caplog.text.count("three-axis positions") == 1


def test_image_sizes_are_set_for_the_call_and_put_back() -> None:
    import diffusers
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as first
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    before = (
        plus.CONDITION_IMAGE_SIZE,
        plus.VAE_IMAGE_SIZE,
        plus.calculate_dimensions,
        first.calculate_dimensions,
    )
    plus_class = diffusers.QwenImageEditPlusPipeline
    with pytest.raises(KeyboardInterrupt), image_sizes(plus_class, FAMILY.editor):  # noqa: PT012
        inside = (plus.CONDITION_IMAGE_SIZE, plus.VAE_IMAGE_SIZE)
        assert inside == (FAMILY.editor.condition_area, FAMILY.editor.vae_area)
        assert inside != before[:2]
        raise KeyboardInterrupt
    with image_sizes(diffusers.QwenImageEditPipeline, FAMILY.editor):
        assert first.calculate_dimensions(1024 * 1024, 1.0)[:2] == (128, 128)
    with image_sizes(plus_class, FAMILY.editor):  # the image for the tower is rounded less than others
        area = FAMILY.editor.condition_area
        assert plus.calculate_dimensions(area, 1.0) == (area**0.5, area**0.5)
        assert {side % 32 for side in plus.calculate_dimensions(area, 1.5)} != {0}
        assert plus.calculate_dimensions(1024 * 1024, 1.5)[:2] == (160, 96)
    with image_sizes(diffusers.QwenImageEditPlusPipeline, FAMILIES["qwen"].editor):
        assert before[0] == plus.CONDITION_IMAGE_SIZE
    after = (
        plus.CONDITION_IMAGE_SIZE,
        plus.VAE_IMAGE_SIZE,
        plus.calculate_dimensions,
        first.calculate_dimensions,
    )
    assert after == before


@pytest.mark.parametrize(
    ("ratio", "grid"), [((1, 1), (14, 14)), ((4, 3), (11, 16)), ((3, 2), (11, 17)), ((16, 9), (10, 18))]
)
def test_condition_grids_of_the_released_plus_pipeline(ratio: tuple[int, int], grid: tuple[int, int]) -> None:
    import diffusers
    from transformers import Qwen2VLImageProcessor

    image = Image.new("RGB", (ratio[0] * 100, ratio[1] * 100))
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})
    editor = FAMILIES["qwen"].editor
    assert condition_grids(diffusers.QwenImageEditPlusPipeline, editor, processor, [image]) == (grid,)
