"""The main job: baseline and enhanced edits of one image, paired, the stock pipeline left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vision_bridge import patches
from qwen_vision_bridge.bridge import VisionBridge
from qwen_vision_bridge.loading.memory import (
    MEMORY_MODES,
    GpuMemoryError,
    MemoryMode,
    check_device,
    find_mode,
)
from qwen_vision_bridge.loading.registry import EDITORS, FAMILIES
from qwen_vision_bridge.patches import (
    condition_size,
    image_sizes,
    looks_like_photograph,
    mrope_positions,
    photo_note,
    vae_size,
)
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from qwen_vision_bridge.specs import Family
from qwen_vision_bridge.synthetic.cases import make_cases
from tests.conftest import SMALL, made_how

PROMPT = "make the suit blue"
SHORT = {"num_inference_steps": 2}


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def stock_edit(pipe: Any, image: Any, positions: str = "fixed", family: Family = SMALL) -> Image.Image:
    """The untouched pipeline, called by hand."""
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"negative_prompt": " ", "true_cfg_scale": 4.0, "generator": generator, **SHORT}
    with image_sizes(type(pipe), family.editor), mrope_positions(pipe, positions):
        return pipe(image=image, prompt=PROMPT, **options).images[0]


def test_strength_zero_is_bit_identical_to_the_stock_pipeline(editor: Any, photo: Image.Image) -> None:
    assert same(editor.generate(photo, PROMPT, strength=0.0, **SHORT), stock_edit(editor.pipe, [photo]))


def test_a_fresh_bridge_gives_the_stock_image_bit_for_bit(pipe: Any, photo: Image.Image) -> None:
    fresh = EnhancedQwenImageEdit(SMALL, bridge="fresh", pipe=pipe)
    assert same(fresh.generate(photo, PROMPT, **SHORT), stock_edit(pipe, [photo]))


def test_without_qwen3_vision_the_edit_is_the_stock_one(editor: Any, photo: Image.Image) -> None:
    assert same(
        editor.generate(photo, PROMPT, use_qwen3_vision=False, **SHORT), stock_edit(editor.pipe, [photo])
    )


def test_mrope_stock_leaves_the_installed_behaviour(pipe: Any, photo: Image.Image) -> None:
    stock = EnhancedQwenImageEdit(SMALL, bridge="fresh", pipe=pipe, mrope="stock")
    edited = stock.generate(photo, PROMPT, **SHORT)
    assert same(edited, stock_edit(pipe, [photo], "stock"))
    assert not same(edited, stock_edit(pipe, [photo], "fixed"))


@pytest.mark.parametrize("site", ["tower", pytest.param("deepstack", marks=pytest.mark.slow)])
def test_a_random_bridge_changes_the_image(site: str, pipe: Any, photo: Image.Image) -> None:
    editor = EnhancedQwenImageEdit(SMALL, bridge="random", pipe=pipe, site=site)
    baseline, enhanced, attention = editor.compare(photo, PROMPT, **SHORT)
    assert not same(baseline, enhanced)
    assert same(baseline, stock_edit(pipe, [photo]))
    assert attention.weights.shape == (sum(rows * columns for rows, columns in attention.grids), 3)


def test_the_source_image_decides_the_edit_too(editor: Any, photo: Image.Image) -> None:
    """With another image's source features the same edit comes out differently."""
    from qwen_vision_bridge.injection import inject

    own = editor.generate(photo, PROMPT, **SHORT)
    foreign = editor.extractor.extract_qwen3_vision(photo.rotate(180), grids=editor.condition_grids([photo]))
    with inject(editor.pipe, editor.bridge, foreign):
        other = editor.generate(photo, PROMPT, use_qwen3_vision=False, **SHORT)
    assert not same(own, other)


def test_the_seed_alone_decides_the_bits(editor: Any, photo: Image.Image) -> None:
    one, again, other = (editor.generate(photo, PROMPT, seed=seed, **SHORT) for seed in (4, 4, 5))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.slow
def test_several_reference_images_are_one_edit(editor: Any, photo: Image.Image) -> None:
    images = [photo.resize((240, 80)), photo.resize((128, 128)), photo.resize((80, 240))]
    result = editor.compare(images, PROMPT, **SHORT)
    grids = editor.condition_grids(images)
    assert grids[1] == (8, 8)
    assert grids[0] == grids[2][::-1]
    assert grids[0][1] == pytest.approx(3 * grids[0][0], abs=2)
    assert result.attention.grids == grids
    assert [weights.shape for weights in result.attention.maps()] == [(*grid, 3) for grid in grids]
    assert same(result.baseline, stock_edit(editor.pipe, images))
    assert not same(result.baseline, result.enhanced)


def test_the_source_tower_is_freed_before_the_dit_unless_kept(pipe: Any, photo: Image.Image) -> None:
    for keep in (False, True):
        editor = EnhancedQwenImageEdit(SMALL, "random", pipe=pipe, keep_source=keep, feature_cache=False)
        alive: list[bool] = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda *_, e=editor, a=alive: a.append(e.extractor._qwen3_model is not None)
        )
        editor.generate(photo, PROMPT, **SHORT)
        handle.remove()
        assert set(alive) == {keep}


@pytest.mark.slow
def test_the_first_edit_pipeline_works_and_takes_one_image(pipe: Any, photo: Image.Image) -> None:
    import diffusers

    first = diffusers.QwenImageEditPipeline(**pipe.components)
    first.set_progress_bar_config(disable=True)
    editor = EnhancedQwenImageEdit("miniature", bridge="random", pipe=first)
    result = editor.compare(photo, PROMPT, **SHORT)
    assert result.baseline.size == (160, 96)
    assert not same(result.baseline, result.enhanced)
    assert same(editor.generate(photo, PROMPT, strength=0.0, **SHORT), result.baseline)
    with pytest.raises(ValueError, match="takes one image, got 2"):
        editor.generate([photo, photo], PROMPT)


@pytest.mark.slow
def test_a_lora_loads_the_stock_way_and_leaves_the_bridge_alone(
    pipe: Any, photo: Image.Image, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from qwen_vision_bridge.bridge import bridge_digest

    editor = EnhancedQwenImageEdit(SMALL, bridge="random", pipe=pipe)
    before, digest = editor.compare(photo, PROMPT, **SHORT), bridge_digest(editor.bridge)
    width, name = 192, "transformer.transformer_blocks.0.attn.to_q"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(lora, tmp_path / "lora.safetensors")
    editor.pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="test")
    try:
        assert editor.pipe.get_list_adapters() == {"transformer": ["test"]}
        with_lora = editor.compare(photo, PROMPT, **SHORT)
        assert not same(with_lora.baseline, before.baseline)
        assert torch.equal(with_lora.attention.weights, before.attention.weights)
        assert bridge_digest(editor.bridge) == digest
        editor.pipe.disable_lora()
        assert same(editor.compare(photo, PROMPT, **SHORT).enhanced, before.enhanced)
    finally:
        editor.pipe.unload_lora_weights()


def test_compare_saves_a_labelled_sheet(editor: Any, photo: Image.Image, tmp_path: Path) -> None:
    editor.compare(photo, PROMPT, tmp_path / "new" / "sheet.png", **SHORT)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 1.4 * sheet.height  # input, baseline and bridge above three differences


@pytest.mark.slow
def test_benchmark_writes_images_and_records_and_resumes(
    editor: Any, photo: Image.Image, tmp_path: Path
) -> None:
    first = editor.benchmark([photo], ["a", "b"], tmp_path, **SHORT)
    written = json.loads((tmp_path / "results.json").read_text())
    assert {"command", "seeds", "family", "source", "editor", "versions", "device", "date"} <= written[
        "provenance"
    ].keys()
    assert [row["prompt"] for row in first] == ["a", "b"]
    for row in first:
        assert all((tmp_path / name).is_file() for name in row["files"].values())
        assert row["mean_abs_difference"] > 0
        about = {name: made_how(tmp_path / file) for name, file in row["files"].items()}
        assert about["baseline"]["arm"] == "baseline"
        assert about["enhanced"]["bridge"]["name"] == editor.bridge_name
        assert (about["comparison"]["seed"], about["comparison"]["models"]) == (0, repr(editor))
    baseline = tmp_path / first[0]["files"]["baseline"]
    stamp = baseline.stat().st_mtime_ns
    again = editor.benchmark([photo], ["a", "b"], tmp_path, **SHORT)
    assert again == first
    assert baseline.stat().st_mtime_ns == stamp
    other = editor.benchmark([photo], ["c"], tmp_path, **SHORT)
    assert [row["prompt"] for row in other] == ["c"]
    assert baseline.stat().st_mtime_ns == stamp
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 3


@pytest.mark.slow
def test_ctrl_c_keeps_finished_pairs_and_a_stock_pipeline(
    editor: Any, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = editor.pipe.scheduler.step

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "results.json").exists():
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    stock = stock_edit(editor.pipe, [photo])
    monkeypatch.setattr(editor.pipe.scheduler, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.benchmark([photo], ["a", "b"], tmp_path, **SHORT)
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert same(stock_edit(editor.pipe, [photo]), stock)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_text_encoder_works_through_the_bridge(
    bits: int, editor_folder: Path, photo: Image.Image
) -> None:
    """bitsandbytes runs on CPUs; the tower stays in full precision, strength 0 is still stock."""
    from diffusers import QwenImageEditPlusPipeline
    from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

    skipped = ["model.visual", "lm_head"]
    if bits == 4:  # on CPUs its blocks of 64 have to divide the input, which they do for down_proj alone
        skipped += ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skipped)
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        editor_folder / "text_encoder", quantization_config=config, dtype=torch.float32
    )
    assert (
        encoder.model.language_model.layers[0].mlp.down_proj.weight.dtype
        is {8: torch.int8, 4: torch.uint8}[bits]
    )
    assert encoder.model.visual.blocks[0].mlp.up_proj.weight.dtype is torch.float32
    pipe = QwenImageEditPlusPipeline.from_pretrained(editor_folder, text_encoder=encoder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(encoder.device)  # a GPU takes quantised weights at once
    editor = EnhancedQwenImageEdit(SMALL, bridge="random", pipe=pipe, dtype=torch.float32)
    baseline, enhanced, _ = editor.compare(photo, PROMPT, **SHORT)
    assert not same(baseline, enhanced)
    assert same(editor.generate(photo, PROMPT, strength=0.0, **SHORT), baseline)


@pytest.mark.slow
def test_group_offload_works_through_the_bridge(editor_folder: Path, pipe: Any, photo: Image.Image) -> None:
    """Offloading to and from the same CPU proves that the hooks live together, bit for bit."""
    from diffusers import QwenImageEditPlusPipeline

    offloaded = QwenImageEditPlusPipeline.from_pretrained(editor_folder, dtype=torch.float32)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_group_offload(onload_device=pipe.device, offload_type="leaf_level")
    options = {"bridge": "random", "dtype": torch.float32}
    plain = EnhancedQwenImageEdit(SMALL, pipe=pipe, **options).compare(photo, PROMPT, **SHORT)
    grouped = EnhancedQwenImageEdit(SMALL, pipe=offloaded, **options)
    result = grouped.compare(photo, PROMPT, **SHORT)
    assert same(result.baseline, plain.baseline)
    assert same(result.enhanced, plain.enhanced)


def test_memory_modes_are_found_by_their_arguments() -> None:
    assert find_mode(False, False, None).name == "plain"
    assert find_mode(False, True, "model").arguments == 'load_in_4bit=True, offload="model"'
    with pytest.raises(ValueError, match="exclude each other"):
        find_mode(True, True, None)
    with pytest.raises(ValueError, match="offload is one of"):
        find_mode(False, False, "disk")
    with pytest.raises(ValueError, match="8-bit weights go with"):
        find_mode(True, False, "group")


def test_too_little_gpu_memory_names_the_modes_that_would_fit() -> None:
    with pytest.raises(
        GpuMemoryError, match=r"plain needs about 63 GB.*20\.0 GB are free.*load_in_4bit=True"
    ):
        check_device(MEMORY_MODES[0], "cuda", FAMILIES["qwen"], 20.0)
    with pytest.raises(GpuMemoryError, match="no mode fits"):
        check_device(MEMORY_MODES[0], "cuda", FAMILIES["qwen"], 3.0)
    check_device(MEMORY_MODES[0], "cuda", FAMILIES["qwen"], 80.0)
    check_device(MEMORY_MODES[0], "cuda", FAMILIES["miniature"], 0.5)


@pytest.mark.parametrize("mode", [MemoryMode("8-bit", bits=8), MemoryMode("model offload", offload="model")])
def test_quantisation_and_offload_without_cuda_are_refused(mode: MemoryMode) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_device(mode, "cpu", FAMILIES["qwen"], None)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"prompt": "  "}, ValueError, "prompt is empty"),
        ({"prompt": 3}, TypeError, "prompt is not a string"),
        ({"prompt": "lone \ud83d"}, ValueError, "surrogate"),
        ({"prompt": "Remove <|image_pad|> too"}, ValueError, r"<\|image_pad\|>"),
        ({"negative_prompt": "<|im_end|>"}, ValueError, "negative_prompt has <"),
        ({"prompt": "x" * 20_000}, ValueError, "has 20000 tokens, at most 3000"),
        ({"strength": float("nan")}, ValueError, "finite"),
        ({"strength": "much"}, TypeError, "strength is a number"),
        ({"seed": 1.5}, TypeError, "seed is a whole number"),
        ({"seed": -1}, ValueError, "from 0 to"),
        ({"seed": 2**64}, ValueError, "from 0 to"),
        ({"num_inference_steps": 1}, ValueError, "whole number from 2"),
        ({"return_dict": False}, TypeError, "unknown option 'return_dict'"),
        ({"height": -64}, ValueError, "height is a whole number"),
        ({"width": 96.5}, ValueError, "width is a whole number"),
        ({"sigmas": []}, ValueError, "sigmas are"),
        ({"sigmas": [0.5, 1.0]}, ValueError, "falling"),
        ({"true_cfg_scale": float("nan")}, ValueError, "finite number from 0"),
        ({"guidance_scale": "much"}, ValueError, "finite number from 0"),
        ({"output_type": "latent", "save_comparison": "sheet.png"}, ValueError, "must be left out"),
        ({"output_type": "jpeg"}, ValueError, "output_type is"),
        ({"save_comparison": "sheet.txt"}, ValueError, r"sheet\.txt is no name for an image"),
        ({"latents": None}, ValueError, "latents cannot be set"),
        ({"image": "absent.png"}, FileNotFoundError, "no such image"),
        ({"image": Image.new("RGB", (3, 30))}, ValueError, "one vision token"),
        ({"image": Image.new("RGB", (800, 8))}, ValueError, "800×8 px, longer than the 64:1"),
        ({"image": Image.new("RGB", (8, 8 * 196))}, ValueError, "longer than the 64:1"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    arguments: dict[str, Any], error: type[Exception], says: str, photo: Image.Image
) -> None:
    editor = EnhancedQwenImageEdit("miniature", bridge="fresh")
    with pytest.raises(error, match=says):
        editor.compare(**{"image": photo, "prompt": PROMPT, **arguments})
    assert editor._pipe is None


@pytest.mark.parametrize("name", ["Qwen-Image-Edit", "Qwen-Image-Edit-2509", "miniature-editor"])
def test_the_longest_image_has_no_side_of_0_px(name: str) -> None:
    """Just below the limit every size that the pipeline works at has 32 px or its own step; at it, none."""
    import diffusers

    editor = EDITORS[name]
    pipeline_class = getattr(diffusers, editor.pipeline_class)
    longest = int(min(editor.max_aspect_ratio, 2000)) - 1
    image = Image.new("1", (longest * 8, 8))
    for size in (condition_size, vae_size):
        assert min(size(pipeline_class, editor, image)) > 0
    beyond = Image.new("1", (int(editor.max_aspect_ratio + 1) * 8, 8))
    sizes = [size(pipeline_class, editor, beyond) for size in (condition_size, vae_size)]
    assert min(map(min, sizes)) == 0


def test_numbers_of_numpy_are_numbers(photo: Image.Image) -> None:
    editor = EnhancedQwenImageEdit("miniature", bridge="fresh")
    options = {"num_inference_steps": np.int64(3), "true_cfg_scale": np.float32(1.5), "height": np.uint16(96)}
    edit = editor.check_edit(photo, PROMPT, np.int64(7), np.float64(0.5), **options)
    plain = editor.check_edit(photo, PROMPT, 7, 0.5, num_inference_steps=3, true_cfg_scale=1.5, height=96)
    assert (edit.seed, edit.strength, edit.options) == (plain.seed, plain.strength, plain.options)
    assert [type(value) for value in edit.options.values()] == [int, float, str, int]
    for wrong in (np.bool_(True), np.array([1, 2]), True):
        with pytest.raises(TypeError, match="whole number"):
            editor.check_edit(photo, PROMPT, wrong)


def test_an_editor_beside_another_target_is_refused(editor_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"width 224.*has 3584"):
        _ = EnhancedQwenImageEdit("qwen", VisionBridge(), editor=editor_folder, device="cpu").pipe


def test_a_damaged_editor_is_one_line(editor_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(editor_folder, tmp_path / "editor")
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="could not be loaded") as caught:
        _ = EnhancedQwenImageEdit("miniature", "fresh", editor=broken, device="cpu").pipe
    assert "\n" not in str(caught.value)


def test_out_of_gpu_memory_names_modes_and_leaves_no_hook(editor: Any, photo: Image.Image) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = editor.pipe.transformer.register_forward_pre_hook(exhausted)
    try:
        with pytest.raises(GpuMemoryError, match=r"ran out of memory in mode plain.*4-bit \+ model offload"):
            editor.generate(photo, PROMPT, **SHORT)
    finally:
        handle.remove()
    assert same(editor.generate(photo, PROMPT, strength=0.0, **SHORT), stock_edit(editor.pipe, [photo]))


def test_what_decides_an_image_is_in_its_key(pipe: Any) -> None:
    random = EnhancedQwenImageEdit(SMALL, bridge="random", pipe=pipe)
    fresh = EnhancedQwenImageEdit(SMALL, bridge="fresh", pipe=pipe, site="deepstack")
    assert random.fingerprint(False) == fresh.fingerprint(False)
    assert random.fingerprint(True)["bridge"] != fresh.fingerprint(True)["bridge"]
    assert random.fingerprint(False)["editor"]["revision"].startswith("local:")


def test_an_image_that_will_be_stretched_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    editor = EnhancedQwenImageEdit("miniature", bridge="fresh")
    for _ in range(2):
        editor.check_edit(Image.new("RGB", (512, 600)), PROMPT)
    editor.check_edit(Image.new("RGB", (256, 256)), PROMPT)
    editor.check_edit(Image.new("RGB", (520, 610)), PROMPT, height=128, width=128)
    assert caplog.text.count("which stretches the image") == 1
    assert "512×600 px becomes 128×128 px" in caplog.text


def test_a_photograph_is_named_once(
    photo: Image.Image, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the models know synthetic scenes alone; the released ones say nothing."""
    monkeypatch.setattr(patches, "_announced", set())
    EnhancedQwenImageEdit("qwen", bridge="fresh", device="cpu").check_edit(photo, PROMPT)
    miniature = EnhancedQwenImageEdit("miniature", device="cpu")
    assert "photograph" not in caplog.text
    for _ in range(2):
        miniature.check_edit(photo, PROMPT)
    assert caplog.text.count("looks like a photograph") == 1
    assert "looks like a photograph" in photo_note(miniature.family, [photo])


def test_noise_and_gradients_look_like_photographs(photo: Image.Image) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 128)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 90.0), -1).astype(np.uint8)
    images = [photo, Image.fromarray(noise), Image.fromarray(gradient)]
    assert [looks_like_photograph(image) for image in images] == [True] * 3


def test_synthetic_images_do_not_look_like_photographs() -> None:
    cases = [case for group in ("ocr", "space", "detail") for case in make_cases(group, 20, seed=3, size=128)]
    images = [image for case in cases for image in [*case.images, case.target]]
    assert len(images) >= 50
    assert not any(looks_like_photograph(image) for image in images)
