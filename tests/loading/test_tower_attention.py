"""The batched attention computes what transformers' loop computes, and is gone outside its `with`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.nn.attention import varlen

from qwen_vision_bridge.loading import tower_attention as attention
from qwen_vision_bridge.loading.registry import MODELS
from qwen_vision_bridge.loading.tower_attention import NAME, batched_attention, tower_attention
from qwen_vision_bridge.loading.towers import load_tower

WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_CUDA])]
GRIDS = {  # patches; a window of the target is 8 × 8 of them
    "square": [[1, 16, 16]],
    "odd, with edge windows": [[1, 18, 14]],
    "one window": [[1, 2, 6]],
    "equal images": [[1, 8, 8]] * 3,
    "unequal images": [[1, 18, 14], [1, 4, 6], [1, 16, 16]],
}


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    return {role: load_tower(MODELS[f"miniature-{role}"]).model for role in ("source", "target")}


def outputs(tower: Any, grids: list[list[int]]) -> list[torch.Tensor]:
    """Everything a tower returns for seeded pixels."""
    device, shapes = next(tower.parameters()).device, torch.tensor(grids)
    width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(shapes.prod(1).sum()), width, generator=generator)
    with torch.no_grad():
        found = tower(pixels.to(device), grid_thw=shapes.to(device))
    return [found.pooler_output, found.last_hidden_state, *(getattr(found, "deepstack_features", None) or ())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("role", ["source", "target"])
def test_batched_attention_equals_the_loop_within_rounding(
    role: str, grids: list[list[int]], device: str, towers: dict[str, Any]
) -> None:
    """Windows and full attention: the target has both kinds of blocks."""
    tower = towers[role].to(device)
    stock = outputs(tower, grids)
    with tower_attention(tower):
        once, again = outputs(tower, grids), outputs(tower, grids)  # worked out, then from what was kept
    tower.to("cpu")
    limit = 2e-5 if device == "cpu" else 1e-3  # other shapes may go to other kernels there
    for expected, first, second in zip(stock, once, again, strict=True):
        torch.testing.assert_close(first, expected, atol=limit, rtol=limit)
        assert torch.equal(first, second)


def test_attention_gets_the_whole_sequence_at_once(
    towers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, calls = towers["target"], []
    stock = functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(tuple(args[0].shape))
        return stock(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    with tower_attention(tower):
        outputs(tower, [[1, 16, 16]])
    assert len(calls) == tower.config.depth
    assert {shape[0] for shape in calls} == {1, 4}  # all at once, and four windows


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 5, 2, 1, 5], [1, 1, 4, 4], [2, 0, 3]], ids=str)
def test_segments_do_not_see_each_other(lengths: list[int]) -> None:
    """Against attention called by hand on every segment."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3))
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    got, weights = batched_attention(torch.nn.Identity(), query, key, value, cu_seq_lens_q=edges, scaling=0.3)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([functional.scaled_dot_product_attention(*part, scale=0.3) for part in parts], dim=2)
    assert weights is None
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 5, 2, 1, 5]], ids=str)
def test_segments_of_several_lengths_take_one_kernel_on_a_gpu(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernel is asked as its reference says; what it gives is handed on."""
    asked = []

    def kernel(
        query: Any, key: Any, value: Any, edges: Any, edges_k: Any, longest: int, longest_k: int
    ) -> Any:
        asked.append(tuple(query.shape))
        assert edges.dtype is edges_k.dtype is torch.int32
        assert longest == longest_k == max(lengths)
        parts = zip(
            *(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (query, key, value)), strict=True
        )
        outputs = [functional.scaled_dot_product_attention(*part) for part in parts]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3)]
    edges = torch.tensor([0, *np.cumsum(lengths)])
    expected, _ = batched_attention(torch.nn.Identity(), *given, cu_seq_lens_q=edges)
    monkeypatch.setattr(attention, "_takes_varlen", lambda query, scaling: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    got, _ = batched_attention(torch.nn.Identity(), *given, cu_seq_lens_q=edges)
    torch.testing.assert_close(got, expected)
    assert asked == ([] if len(set(lengths)) == 1 else [(sum(lengths), 2, 8)])


def test_the_kernel_for_several_lengths_is_for_16_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = attention._takes_varlen
    assert not takes(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16), None)
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    head = SimpleNamespace(is_cuda=True, element_size=lambda: 2, shape=(1, 2, 3, 16), device="cuda")
    assert takes(head, None)
    assert takes(head, 0.25)
    assert not takes(head, 0.3)
    assert not takes(SimpleNamespace(**{**vars(head), "shape": (1, 2, 3, 12)}), None)
    assert not takes(SimpleNamespace(**{**vars(head), "element_size": lambda: 4}), None)


@pytest.mark.gpu
@WITHOUT_CUDA
@pytest.mark.parametrize("width", [80, 72])
def test_the_kernel_for_several_lengths_changes_rounding_alone(width: int) -> None:
    """Heads of both towers' widths against attention by hand in 32 bits."""
    lengths = [64, 64, 16, 64, 4]
    generator = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(1, 4, sum(lengths), width, generator=generator, device="cuda") for _ in range(3)]
    edges = torch.tensor([0, *np.cumsum(lengths)], device="cuda")
    halves = [tensor.bfloat16() for tensor in given]
    assert attention._takes_varlen(halves[0], width**-0.5)
    got, _ = batched_attention(torch.nn.Identity(), *halves, cu_seq_lens_q=edges, scaling=width**-0.5)
    parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in halves), strict=True)
    exact = torch.cat([functional.scaled_dot_product_attention(*part) for part in parts], dim=2)
    torch.testing.assert_close(got.float(), exact.transpose(1, 2), atol=1e-2, rtol=1e-2)


def test_outside_the_with_the_tower_is_stock_again(towers: dict[str, Any]) -> None:
    tower = towers["target"]
    before = tower.config._attn_implementation
    with tower_attention(tower):
        assert tower.config._attn_implementation == NAME
    with pytest.raises(RuntimeError, match="planted"), tower_attention(tower):
        raise RuntimeError("planted")
    assert tower.config._attn_implementation == before
    assert not tower._forward_pre_hooks


def test_a_users_own_flash_attention_is_left_alone(towers: dict[str, Any]) -> None:
    tower = towers["source"]
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "flash_attention_2"
    with tower_attention(tower):
        assert tower.config._attn_implementation == "flash_attention_2"
    tower.config._attn_implementation = before


def test_an_unknown_mode_is_refused(towers: dict[str, Any]) -> None:
    from qwen_vision_bridge.extractor import VisionCacheExtractor
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    for build in (
        lambda: VisionCacheExtractor("miniature", vision_attention="fast"),
        lambda: EnhancedQwenImageEdit("miniature", "fresh", vision_attention="fast"),
    ):
        with pytest.raises(ValueError, match='"batched" or "stock", not \'fast\''):
            build()


@pytest.mark.parametrize("mode", ["batched", pytest.param("stock", marks=pytest.mark.slow)])
def test_strength_zero_is_the_pipeline_with_the_same_attention(
    mode: str, pipe: Any, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline called by hand, and both arms of the toolkit, use one and the same attention."""
    from qwen_vision_bridge.patches import batched_vision, image_sizes, mrope_positions
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
    from tests.conftest import SMALL

    used = []
    stock = attention.batched_attention
    monkeypatch.setattr(attention, "batched_attention", lambda *a, **k: used.append(1) or stock(*a, **k))
    editor = EnhancedQwenImageEdit(SMALL, "random", pipe=pipe, vision_attention=mode, feature_cache=False)
    options = {"prompt": "make the suit blue", "num_inference_steps": 2}
    found = {}
    for arm, changes in {"zero": {"strength": 0.0}, "baseline": {"use_qwen3_vision": False}}.items():
        used.clear()
        found[arm] = np.asarray(editor.generate(photo, **options, **changes))
        assert bool(used) == (mode == "batched"), arm
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = image_sizes(type(pipe), editor.family.editor)
    with batched_vision(pipe, mode), mrope_positions(pipe), sizes:
        byhand = pipe(image=[photo], negative_prompt=" ", true_cfg_scale=4.0, generator=generator, **options)
    for image in found.values():
        assert np.array_equal(image, np.asarray(byhand.images[0]))
    assert pipe.text_encoder.model.visual.config._attn_implementation != NAME
