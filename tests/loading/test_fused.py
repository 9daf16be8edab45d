"""Fused layers compute what transformers' layers compute, and only where that pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers.hooks
import pytest
import torch
from torch import nn

from qwen_vision_bridge.loading import fused
from qwen_vision_bridge.loading.fused import fused_layers, padded_feed_forward, rotated
from qwen_vision_bridge.loading.tower_attention import tower_attention

CALLS = ("fused_attention", "fused_norm", "padded_feed_forward")


class Gated(nn.Module):
    """A feed-forward layer as transformers' vision blocks have it."""

    def __init__(self, width: int, between: int, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, between, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(between, width, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what computes layers in place of transformers, which it does on the CPU as on a GPU here."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        stock = getattr(fused, name)
        return lambda *args, **options: calls.append(name) or stock(*args, **options)

    for name in CALLS:
        monkeypatch.setattr(fused, name, counted(name))
    monkeypatch.setattr(fused, "_pays", lambda hidden: True)
    monkeypatch.setattr(fused, "PADDED_FROM", 0)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [12, 9, 15])
def test_a_padded_layer_gives_what_the_layer_gives(between: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, hidden = Gated(16, between, bias), torch.randn(3, 5, 16, requires_grad=True)
    expected, got = layer(hidden), padded_feed_forward(layer, hidden)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out.square().sum(), hidden)[0] for out in (expected, got)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers_up_to_the_last_bit(dtype: torch.dtype) -> None:
    """Queries and keys side by side, as slices of one product; cosines that differ in both halves."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(37, 3, 4, 20, generator=generator).to(dtype)[:, :2]
    cos, sin = torch.randn(2, 37, 20, generator=generator)
    expected = apply_rotary_pos_emb_vision(heads[:, 0], heads[:, 1], cos, sin)
    got = rotated(heads, cos, sin)
    assert got.dtype is dtype
    eps = torch.finfo(dtype).eps
    for one, other in zip(got.unbind(1), expected, strict=True):
        torch.testing.assert_close(one, other, atol=eps, rtol=eps)


def test_layers_are_fused_inside_the_with_alone(seen: list[str]) -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Gated(16, 12), Gated(16, 24)), torch.randn(2, 16)
    before, expected = {name: w.clone() for name, w in model.state_dict().items()}, model(hidden)
    with fused_layers(model):
        torch.testing.assert_close(model(hidden), expected)
        assert seen == ["padded_feed_forward"]  # the second is wide enough as it is
    with pytest.raises(RuntimeError, match="planted"), fused_layers(model):
        raise RuntimeError("planted")
    assert torch.equal(model(hidden), expected)
    assert len(seen) == 1
    assert "forward" not in vars(model[0])
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def odd_tower() -> nn.Module:
    """The target's tower at the released width, 3420, in two narrow blocks, one of them with windows."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=3420,
        out_hidden_size=16,
        fullatt_block_indexes=[1],
    )
    torch.manual_seed(0)
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def test_every_kind_of_layer_of_the_target_is_fused_and_equal(seen: list[str]) -> None:
    check_fused(odd_tower(), [[1, 4, 4], [1, 10, 18]])
    counts = {name: seen.count(name) for name in CALLS}
    assert counts == {"fused_attention": 2, "padded_feed_forward": 2, "fused_norm": 2 * 2 + 1}


@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_offloaded_layers_keep_their_hooks(offload: str, seen: list[str]) -> None:
    """As the pipeline's offloading modes place them; a CPU stands for the GPU here."""
    tower, cpu = odd_tower(), torch.device("cpu")
    pixels, grids = torch.randn(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        expected = tower(pixels, grid_thw=grids).pooler_output
        if offload == "group":
            diffusers.hooks.apply_group_offloading(
                tower, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
            )
        else:
            accelerate.cpu_offload(tower, execution_device=cpu)
        hooks = {name: vars(module).get("forward") for name, module in tower.named_modules()}
        with tower_attention(tower):
            got = tower(pixels, grid_thw=grids).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert hooks == {name: vars(module).get("forward") for name, module in tower.named_modules()}
    assert hooks["blocks.0.mlp.gate_proj"] is not None
    assert set(seen) <= {"fused_attention"}  # whose products are calls of layers with their hooks


def test_the_sources_attention_is_fused_and_gives_the_same(seen: list[str]) -> None:
    """Its norms are PyTorch's and its widths even: they are left."""
    from qwen_vision_bridge.loading.registry import MODELS
    from qwen_vision_bridge.loading.towers import load_tower

    tower = load_tower(MODELS["miniature-source"]).model
    check_fused(tower, [[1, 4, 4], [1, 6, 10]])
    assert seen == ["fused_attention"] * len(tower.blocks)


def check_fused(tower: nn.Module, grids: list[list[int]]) -> None:
    """Nothing is fused outside, and all outputs are the same inside; gradients are not asked for."""
    config, shapes = tower.config, torch.tensor(grids)
    width = 3 * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(shapes.prod(1).sum()), width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = tower(pixels, grid_thw=shapes)
        with tower_attention(tower):
            got = tower(pixels, grid_thw=shapes)
    torch.testing.assert_close(got.pooler_output, stock.pooler_output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.last_hidden_state, stock.last_hidden_state, atol=2e-5, rtol=2e-5)


def test_calls_on_a_cpu_or_in_32_bits_are_left_as_they_are() -> None:
    with torch.no_grad():
        assert not fused._pays(torch.zeros(1, dtype=torch.bfloat16))
        assert not fused._pays(torch.zeros(1))
        assert not fused._pays(SimpleNamespace(is_cuda=True, element_size=lambda: 4))


def test_calls_that_may_want_gradients_are_left_as_they_are() -> None:
    """Also where the input has none and a weight asks for one, as with adapters."""
    half = SimpleNamespace(is_cuda=True, element_size=lambda: 2, requires_grad=False)
    assert not fused._pays(half)
    with torch.no_grad():
        assert fused._pays(half)


def test_few_patches_are_not_padded(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PADDED_FROM", 3)
    layer = Gated(16, 12)
    with fused_layers(layer):
        for patches in (2, 3):
            layer(torch.randn(patches, 16))
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["another class", "hooked layer", "hooked projection", "wrapped forward"])
def test_layers_that_do_more_than_their_class_says_keep_doing_it(change: str, seen: list[str]) -> None:
    class Quantised(nn.Linear):
        pass

    layer, called = Gated(16, 12), []
    if change == "another class":
        layer.up_proj = Quantised(16, 12)
    elif change == "hooked layer":
        layer.register_forward_hook(lambda *_: called.append(1))
    elif change == "hooked projection":
        layer.down_proj.register_forward_pre_hook(lambda *_: called.append(1))
    else:
        stock = layer.gate_proj.forward
        layer.gate_proj.forward = lambda hidden: called.append(1) or stock(hidden)
    with fused_layers(layer):
        layer(torch.randn(2, 16))
    assert not seen
    assert len(called) == (change != "another class")


def test_a_compiled_block_is_left_to_its_compiler(seen: list[str]) -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(nn.Sequential(Gated(16, 12)), Gated(16, 12)), torch.randn(2, 16)
    expected = model(hidden)
    model[0].compile(backend="eager")
    with fused_layers(model):
        torch.testing.assert_close(model(hidden), expected)
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side", [28, 74])
def test_on_a_gpu_in_16_bits_fusing_changes_rounding_alone(side: int) -> None:
    """Six blocks of the released widths: as far from 32 bits as transformers' layers, within a tenth."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(depth=6, hidden_size=1280, num_heads=16, intermediate_size=3420)
    with torch.device("cuda"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval().requires_grad_(False)
    grids, pixels = torch.tensor([[1, side, side]]), torch.randn(side * side, 1176, device="cuda")
    exact = tower(pixels, grid_thw=grids.cuda()).pooler_output
    tower.to(torch.bfloat16)
    found = []
    for mode in ("stock", "batched"):
        with torch.no_grad(), tower_attention(tower, mode):
            found.append(tower(pixels.bfloat16(), grid_thw=grids.cuda()).pooler_output.float())
    stock, ours = (float((one - exact).norm() / exact.norm()) for one in found)
    assert not torch.equal(*found)
    assert ours < 1.1 * stock < 0.1
