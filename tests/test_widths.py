"""Padded feed-forward layers compute what the layers compute, and only where that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qwen_vision_bridge import widths
from qwen_vision_bridge.attention import tower_attention
from qwen_vision_bridge.widths import padded_feed_forward, padded_widths


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
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is padded, with padding on the CPU as on a GPU."""
    calls: list[tuple[int, ...]] = []
    stock = widths.padded_feed_forward

    def padded(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(hidden.shape))
        return stock(layer, hidden)

    monkeypatch.setattr(widths, "_pays", lambda hidden: True)
    monkeypatch.setattr(widths, "padded_feed_forward", padded)
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


def test_layers_are_padded_inside_the_with_alone(seen: list[Any]) -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Gated(16, 12), Gated(16, 24)), torch.randn(2, 16)
    before, expected = {name: w.clone() for name, w in model.state_dict().items()}, model(hidden)
    with padded_widths(model):
        torch.testing.assert_close(model(hidden), expected)
        assert len(seen) == 1  # the second is wide enough as it is
    with pytest.raises(RuntimeError, match="planted"), padded_widths(model):
        raise RuntimeError("planted")
    assert torch.equal(model(hidden), expected)
    assert len(seen) == 1
    assert "forward" not in vars(model[0])
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_the_target_towers_blocks_are_padded_while_it_attends_in_batches(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the released width, 3420, in a tower of one narrow block."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=3420, out_hidden_size=16
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    pixels, grids = torch.randn(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        expected = tower(pixels, grid_thw=grids).pooler_output
        assert not seen
        with tower_attention(tower):
            got = tower(pixels, grid_thw=grids).pooler_output
    assert len(seen) == 1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_calls_on_a_cpu_or_in_32_bits_are_left_as_they_are() -> None:
    assert not widths._pays(torch.zeros(1, dtype=torch.bfloat16))
    assert not widths._pays(torch.zeros(1))


@pytest.mark.parametrize("change", ["another class", "hooked layer", "hooked projection", "wrapped forward"])
def test_layers_that_do_more_than_their_class_says_keep_doing_it(change: str, seen: list[Any]) -> None:
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
    with padded_widths(layer):
        layer(torch.randn(2, 16))
    assert not seen
    assert len(called) == (change != "another class")


def test_a_compiled_block_is_left_to_its_compiler(seen: list[Any]) -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(nn.Sequential(Gated(16, 12)), Gated(16, 12)), torch.randn(2, 16)
    expected = model(hidden)
    model[0].compile(backend="eager")
    with padded_widths(model):
        torch.testing.assert_close(model(hidden), expected)
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_16_bits_padding_changes_rounding_alone() -> None:
    torch.manual_seed(0)
    layer = Gated(1280, 3420).to("cuda", torch.bfloat16)
    hidden = torch.randn(512, 1280, device="cuda", dtype=torch.bfloat16)
    exact = layer.float()(hidden.float())
    layer.to(torch.bfloat16)
    with torch.no_grad(), padded_widths(layer):
        got = layer(hidden)
        plain = type(layer).forward(layer, hidden)
    errors = [float((out.float() - exact).norm() / exact.norm()) for out in (got, plain)]
    assert errors[0] < max(1e-2, 1.5 * errors[1])
