"""Extraction: the right features of the right places, one model at a time, none where the cache has them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vision_bridge import extractor as extractor_module
from qwen_vision_bridge.extractor import ExtractionOptions, VisionCacheExtractor
from qwen_vision_bridge.loading.checkpoints import locate
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.loading.token_grid import PixelLimits, pixel_limits, stated_limits, token_grid
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.specs import TARGET_PX

FAMILY = FAMILIES["miniature"]
PX, AREA = FAMILY.target.token_px, TARGET_PX**2  # px²: no image is seen larger


@pytest.fixture
def extractor() -> VisionCacheExtractor:
    return VisionCacheExtractor("miniature", feature_cache=False, device="cpu", keep_models=True)


def test_the_documented_calls_give_the_documented_shapes(extractor: VisionCacheExtractor) -> None:
    image = Image.new("RGB", (128, 128), "red")
    qwen3, qwen25 = extractor.extract_qwen3_vision(image, "x"), extractor.extract_qwen25_vision(image, "x")
    for features in (qwen3.early_features, qwen3.mid_features, qwen3.late_features, qwen3.merged_features):
        assert features.shape == torch.Size([1, AREA // PX**2, FAMILY.source.out_dim])
    assert qwen25.vision_features.shape == torch.Size([1, AREA // PX**2, FAMILY.target.out_dim])
    assert qwen3.grid == qwen25.grid == (int(AREA**0.5) // PX,) * 2


@given(
    width=st.integers(1, 5000), height=st.integers(1, 5000), px=st.sampled_from([8, 28]), limit=st.booleans()
)
def test_token_grids_are_those_of_transformers(width: int, height: int, px: int, limit: bool) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    limits = PixelLimits(64**2, 64**2) if limit else PixelLimits(56 * 56, 28 * 28 * 16384)
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(ValueError, match="crop the image"):
            token_grid(width, height, px, limits)
        return
    rows, columns = token_grid(width, height, px, limits)
    assert (rows * px, columns * px) == smart_resize(height, width, px, *limits)


def test_a_448_px_image_gives_256_tokens_at_the_released_shapes() -> None:
    released = PixelLimits(56 * 56, 28 * 28 * 16384)
    assert token_grid(448, 448, FAMILIES["qwen"].target.token_px, released) == (16, 16)


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"size": {"shortest_edge": 3136, "longest_edge": 4096}}, (3136, 4096)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 4096}, "max_pixels": 9999}, (3136, 9999)),
        ({"min_pixels": 3136, "max_pixels": 12845056}, (3136, 12845056)),
        ({}, (56 * 56, 28 * 28 * 1280)),
    ],
)
def test_pixel_limits_are_those_of_the_processor(
    config: dict[str, Any], limits: tuple[int, int], tmp_path: Path
) -> None:
    """Read from the config where it states them, else asked of transformers' processor."""
    text = json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **config})
    (tmp_path / "preprocessor_config.json").write_text(text)
    spec = replace(FAMILY.target, repo=str(tmp_path), processor_subfolder="")
    size = load_processor(str(tmp_path)).size
    assert pixel_limits(spec) == limits == (size["shortest_edge"], size["longest_edge"])
    assert (stated_limits(tmp_path) is None) == (not config)


def test_features_from_the_cache_import_no_transformers(tmp_path: Path) -> None:
    """Their import takes longer than all the rest."""
    code = (
        "import sys; from PIL import Image; from qwen_vision_bridge import VisionCacheExtractor; "
        f"cache = VisionCacheExtractor('miniature', feature_cache={str(tmp_path)!r}, device='cpu'); "
        "cache.extract_qwen3_vision(Image.new('RGB', (64, 64))); "
        "print('transformers' in sys.modules, 'torchvision' in sys.modules)"
    )
    command, options = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    runs = [subprocess.run(command, **options, timeout=120) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["True", "True"], ["False", "False"]]


def test_levels_and_merged_are_the_stock_towers_own(
    extractor: VisionCacheExtractor, photo: Image.Image
) -> None:
    """Against the whole model called with the source's own processor."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    cache = extractor.extract_qwen3_vision(photo)
    model = Qwen3VLForConditionalGeneration.from_pretrained(locate("builtin:source"), dtype=torch.float32)
    rows, columns = cache.grid
    inputs = AutoProcessor.from_pretrained(locate("builtin:source")).image_processor(
        images=[photo.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)],
        do_resize=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    for got, expected in zip(cache.levels, output.deepstack_features, strict=True):
        assert torch.equal(
            got[0], torch.cat(tuple(expected)).view_as(got[0])
        )  # one tensor an image, or packed
    assert torch.equal(cache.merged_features[0], output.pooler_output[0])


def test_the_baseline_is_the_pipelines_own_towers_output(
    extractor: VisionCacheExtractor, pipe: Any, photo: Image.Image
) -> None:
    from qwen_vision_bridge.injection import capture_vision

    with torch.no_grad(), capture_vision(pipe) as seen:
        pipe.encode_prompt("x", image=[photo])
    cache = extractor.extract_qwen25_vision(photo)
    assert seen.grids == cache.grids
    torch.testing.assert_close(seen.baselines[0].cpu(), cache.vision_features[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", [(128, 128), (210, 96), (98, 240)], ids=["square", "wide", "tall"])
def test_token_i_of_source_and_target_is_the_same_place(
    extractor: VisionCacheExtractor, size: tuple[int, int]
) -> None:
    """A bright spot moves the same tokens in both, and they are where a naive row-by-row count puts it."""
    plain = Image.new("RGB", size, (90, 90, 90))
    rows, columns = extractor.target_grid(plain)
    for row, column in ((0, 0), (rows - 1, columns // 2), (rows // 2, columns - 1)):
        spot = plain.copy()
        width, height = size[0] / columns, size[1] / rows
        box = [round(v) for v in (column * width, row * height, (column + 1) * width, (row + 1) * height)]
        spot.paste((255, 255, 0), tuple(box))
        for extract, name in (
            (extractor.extract_qwen3_vision, "early"),
            (extractor.extract_qwen25_vision, "vision"),
        ):
            change = (extract(spot).features[name] - extract(plain).features[name])[0].norm(dim=-1)
            assert change.argmax() == row * columns + column, (name, row, column)


def test_the_patch_order_equals_a_naive_reference() -> None:
    """Pixels of the processor, block by block of merge × merge patches, row by row."""
    processor = VisionCacheExtractor("miniature")._image_processor("qwen3")
    rows, columns, px = 3, 5, FAMILY.source.token_px
    image = Image.new("RGB", (columns * px, rows * px))
    image.putdata(
        [(x * 3 % 256, y * 5 % 256, (x + y) % 256) for y in range(rows * px) for x in range(columns * px)]
    )
    got = processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
    pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32).reshape(
        rows * px, columns * px, 3
    )
    pixels, expected, side = (pixels / 255 - 0.5) / 0.5, [], px // 2
    for row in range(rows):
        for column in range(columns):
            for dy in range(2):
                for dx in range(2):
                    y, x = row * px + dy * side, column * px + dx * side
                    patch = pixels[y : y + side, x : x + side].permute(2, 0, 1)  # (3, side, side)
                    expected.append(patch[:, None].expand(-1, 2, -1, -1).flatten())  # both frames alike
    torch.testing.assert_close(got, torch.stack(expected))


def test_several_images_are_packed_in_order(extractor: VisionCacheExtractor, photo: Image.Image) -> None:
    other = photo.rotate(90, expand=True)
    both = extractor.extract_qwen3_vision([photo, other])
    assert both.grids == (extractor.target_grid(photo), extractor.target_grid(other))
    for part, image in zip(both.split(), (photo, other), strict=True):
        alone = extractor.extract_qwen3_vision(image)
        torch.testing.assert_close(part.late_features, alone.late_features, atol=1e-4, rtol=1e-4)


def test_the_prompt_changes_language_features_alone(photo: Image.Image) -> None:
    options = {"feature_cache": False, "device": "cpu"}
    towers = VisionCacheExtractor("miniature", **options)
    first, second = (towers.extract_qwen3_vision(photo, prompt) for prompt in ("a word", "another"))
    assert torch.equal(first.late_features, second.late_features)
    whole = VisionCacheExtractor("miniature", scope="language", **options)
    for extract, name in ((whole.extract_qwen3_vision, "late"), (whole.extract_qwen25_vision, "vision")):
        first, second = (extract(photo, prompt) for prompt in ("a word", "another"))
        rows, columns = (int((AREA * ratio) ** 0.5) // PX for ratio in (2 / 3, 3 / 2))  # the photo is 3:2
        assert first.features[name].shape[1] == rows * columns
        assert not torch.equal(first.features[name], second.features[name])


def test_language_features_come_after_the_deepstack_adds(photo: Image.Image) -> None:
    """Against the inputs of the next layer, which are what DeepStack left."""
    whole = VisionCacheExtractor(
        "miniature", scope="language", feature_cache=False, device="cpu", keep_models=True
    )
    whole.extract_qwen3_vision(photo, "x")
    model, seen = whole._qwen3_model, {}
    layers = model.model.language_model.layers
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    cache = whole.extract_qwen3_vision(photo, "x")
    for handle in handles:
        handle.remove()
    assert whole.language_layers == (1, 2, 3)
    tokens = cache.early_features.shape[1]
    start = next(i for i in range(seen[1].shape[1]) if torch.equal(seen[1][0, i], cache.early_features[0, 0]))
    assert torch.equal(seen[1][:, start : start + tokens], cache.early_features)
    assert torch.equal(seen[2][:, start : start + tokens], cache.mid_features)


def test_a_second_extraction_loads_no_model(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VisionCacheExtractor("miniature", feature_cache=tmp_path).extract_qwen3_vision(photo)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(extractor_module, "load_tower", fail)
    again = VisionCacheExtractor("miniature", feature_cache=tmp_path)
    second = again.extract_qwen3_vision(photo.copy())
    assert torch.equal(first.late_features, second.late_features)
    assert second.loaded_from is not None
    with pytest.raises(AssertionError, match="a model was loaded"):
        again.extract_qwen3_vision(photo.rotate(180))


def test_features_of_an_earlier_version_are_recomputed(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract() -> int:
        VisionCacheExtractor("miniature", feature_cache=tmp_path).extract_qwen3_vision(photo)
        return len([path for path in tmp_path.rglob("*") if path.is_file()])

    kept = extract()
    assert extract() == kept
    monkeypatch.setattr(extractor_module, "FEATURES_VERSION", "0")
    assert extract() > kept


@pytest.mark.parametrize("part", ["blocks.2.norm1.weight", "patch_embed.proj.bias"])
def test_a_tower_with_nan_weights_names_the_weight(
    part: str, extractor: VisionCacheExtractor, photo: Image.Image
) -> None:
    extractor.warm("qwen3")
    with torch.no_grad():
        extractor._qwen3_model.get_parameter(part)[0] = float("nan")
    grids = [(4, 4)]
    for extract in (
        lambda: extractor.extract_qwen3_vision(photo, "other than any kept", grids),
        lambda: extractor.extract_batch("qwen3", [photo.resize((64, 64))], grids),
    ):
        with pytest.raises(ValueError, match=rf"miniature-source hold NaN or infinity.*{part}"):
            extract()
    extractor.unload()


def test_one_model_is_in_memory_unless_both_are_kept(photo: Image.Image) -> None:
    for keep in (False, True):
        extractor = VisionCacheExtractor("miniature", feature_cache=False, keep_models=keep)
        assert extractor._qwen3_model is None
        extractor.extract_qwen3_vision(photo)
        assert extractor._qwen3_model is not None
        extractor.extract_qwen25_vision(photo)
        assert (extractor._qwen3_model is not None) == keep
        extractor.unload()
        assert extractor._qwen25_model is None


def test_del_frees_a_model_and_the_next_call_reloads_it(photo: Image.Image) -> None:
    extractor = VisionCacheExtractor("miniature", feature_cache=False)
    first = extractor.extract_qwen3_vision(photo)
    del extractor._qwen3_model
    assert extractor._qwen3_model is None
    del extractor._qwen3_model  # as after a cache hit, when there is nothing to delete
    assert torch.equal(extractor.extract_qwen3_vision(photo).late_features, first.late_features)


def test_rare_settings_come_as_options_or_keywords() -> None:
    options = ExtractionOptions(vision_attention="stock", keep_models=True)
    for extractor in (
        VisionCacheExtractor("miniature", options=options),
        VisionCacheExtractor("miniature", vision_attention="stock", keep_models=True),
    ):
        assert extractor.options == options
    with pytest.raises(TypeError):
        VisionCacheExtractor("miniature", keep_model=True)
    with pytest.raises(ValueError, match="vision_attention"):
        ExtractionOptions(vision_attention="fast")  # type: ignore[arg-type]


def test_bad_arguments_are_refused_before_loading(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="scope"):
        VisionCacheExtractor("miniature", scope="all")
    with pytest.raises(ValueError, match=r"\(2, 1, 3\)"):
        VisionCacheExtractor("miniature", language_layers=(2, 1, 3))
    with pytest.raises(ValueError, match=f"{PX}×{PX}"):
        VisionCacheExtractor("miniature").extract_qwen3_vision(Image.new("RGB", (PX - 1, 10 * PX)))
    with pytest.raises(ValueError, match="got 2"):
        VisionCacheExtractor("miniature").extract_qwen3_vision(photo, grids=[(3, 3), (3, 3)])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            VisionCacheExtractor("miniature", load_in_8bit=True)


def test_a_full_disk_costs_the_cache_and_not_the_features(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwen_vision_bridge.features import FeatureCache

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureCache, "put", full)
    extractor = VisionCacheExtractor("miniature", feature_cache=tmp_path)
    assert extractor.extract_qwen3_vision(photo).late_features.isfinite().all()
    assert "No space left on device" in caplog.text
