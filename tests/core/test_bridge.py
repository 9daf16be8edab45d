"""The bridge: identity at the start, linear, bounded, of the stated size, and never unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from qwen_vision_bridge.bridge import (
    WEIGHTS,
    BridgeConfig,
    VisionBridge,
    bridge_digest,
    check_strength,
    count_parameters,
    resolve_bridge,
)
from qwen_vision_bridge.loading.registry import FAMILIES

SMALL = BridgeConfig(source_dim=256, target_dim=224, rank=48, query_dim=48)
RANDOM = BridgeConfig(source_dim=256, target_dim=224, rank=48, query_dim=48, init="random")


def test_the_default_bridge_has_5_2_million_parameters() -> None:
    assert 5.15e6 <= count_parameters(VisionBridge()) <= 5.25e6


def test_without_a_rank_every_level_has_a_full_projection() -> None:
    bridge = VisionBridge(BridgeConfig(source_dim=256, target_dim=224, rank=None, query_dim=48))
    assert [tuple(up.weight.shape) for up in bridge.ups] == [(224, 256)] * 3


@pytest.mark.parametrize("rank", [48, None])
def test_an_untrained_bridge_is_exactly_the_identity(rank: int | None, levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(BridgeConfig(source_dim=256, target_dim=224, rank=rank, query_dim=48))
    assert torch.equal(bridge(levels, baseline).features, baseline)


@pytest.mark.parametrize("rank", [48, None])
def test_a_random_bridge_changes_each_token_by_about_its_rms(
    rank: int | None, levels_and_baseline: Any
) -> None:
    levels, baseline = levels_and_baseline
    config = BridgeConfig(source_dim=256, target_dim=224, rank=rank, query_dim=48, init="random")
    update = VisionBridge(config)(levels, baseline).features - baseline
    ratio = update.square().mean(-1).sqrt() / baseline.square().mean(-1).sqrt()
    assert 0.3 < ratio.min() <= ratio.max() < 3.0


def test_strength_zero_returns_the_baseline_itself(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    assert VisionBridge(RANDOM)(levels, baseline, strength=0).features is baseline


def test_strength_scales_the_update(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(RANDOM)
    half, whole = (bridge(levels, baseline, strength).features - baseline for strength in (0.5, 1.0))
    torch.testing.assert_close(2 * half, whole, atol=1e-5, rtol=1e-5)


def test_the_update_follows_the_written_formula(levels_and_baseline: Any) -> None:
    """Against a token-by-token, head-by-head reference in float64."""
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(RANDOM).double()
    config, token = bridge.config, 7
    x = [level[0, token].double() for level in levels]
    b = baseline[0, token].double()

    def norm(values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean() + 1e-6).sqrt()

    z = [bridge.downs[i].weight @ norm(x[i]) for i in range(3)]
    q = (bridge.query.weight @ norm(b)).split(config.query_dim // config.heads)
    k = [(bridge.keys[i].weight @ z[i]).split(config.query_dim // config.heads) for i in range(3)]
    u = torch.zeros_like(b)
    for head in range(config.heads):
        scores = (
            torch.stack([q[head] @ k[i][head] for i in range(3)]) / (config.query_dim / config.heads) ** 0.5
        )
        weights = scores.softmax(0)
        width = config.rank // config.heads
        part = slice(head * width, (head + 1) * width)
        u += sum(weights[i] * (bridge.ups[i].weight[:, part] @ z[i][part]) for i in range(3))
    expected = b + b.square().mean().sqrt() * u.clamp(-config.clamp, config.clamp)
    out = bridge([level.double() for level in levels], baseline.double()).features[0, token]
    torch.testing.assert_close(out, expected)


def test_level_weights_sum_to_1_and_parts_to_the_update(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(RANDOM)
    output = bridge(levels, baseline)
    torch.testing.assert_close(output.level_weights.sum(-1), torch.ones(1, 20))
    parts, _ = bridge.contributions(levels, baseline)
    torch.testing.assert_close(torch.stack(parts).sum(0), output.features - baseline, atol=1e-5, rtol=1e-5)


def test_no_channel_moves_further_than_the_clamp(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(RANDOM)
    for up in bridge.ups:
        up.weight.data *= 100
    update = bridge(levels, baseline).features - baseline
    limit = RANDOM.clamp * baseline.square().mean(-1, keepdim=True).sqrt()
    assert (update.abs() <= limit * 1.001).all()


def test_tokens_do_not_see_each_other(levels_and_baseline: Any) -> None:
    """Which makes the cost linear in their number."""
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(RANDOM)
    together = bridge(levels, baseline).features[:, 3:5]
    alone = bridge([level[:, 3:5] for level in levels], baseline[:, 3:5]).features
    torch.testing.assert_close(together, alone)


def test_gradients_reach_a_fresh_bridge(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(SMALL)
    bridge(levels, baseline).features.square().sum().backward()
    assert all(up.weight.grad.abs().sum() > 0 for up in bridge.ups)


def test_half_precision_baselines_keep_their_dtype(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    assert VisionBridge(RANDOM)(levels, baseline.bfloat16()).features.dtype is torch.bfloat16


def test_wrong_shapes_are_named(levels_and_baseline: Any) -> None:
    levels, baseline = levels_and_baseline
    bridge = VisionBridge(SMALL)
    with pytest.raises(ValueError, match="3 levels"):
        bridge(levels[:2], baseline)
    with pytest.raises(ValueError, match=r"level 'mid' is \(1, 20, 256\), got \(1, 19, 256\)"):
        bridge([levels[0], levels[1][:, 1:], levels[2]], baseline)
    with pytest.raises(ValueError, match=r"baseline is \(B, N, 224\)"):
        bridge(levels, baseline[..., 1:])


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        check_strength(strength)


@pytest.mark.parametrize("strength", ["1", None, True])
def test_a_strength_that_is_no_number_is_refused(strength: object) -> None:
    with pytest.raises(TypeError, match="strength"):
        check_strength(strength)


@pytest.mark.parametrize(
    "changes",
    [{"rank": 50}, {"heads": 0}, {"init": "ones"}, {"clamp": float("nan")}, {"levels": ()}, {"seed": -1}],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        BridgeConfig(**changes)


def test_save_and_load_keep_every_bit_and_the_config(tmp_path: Path) -> None:
    bridge = VisionBridge(BridgeConfig.for_family(FAMILIES["miniature"], init="random"))
    bridge.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = VisionBridge.from_pretrained(tmp_path)
    assert loaded.config == bridge.config
    assert bridge_digest(loaded) == bridge_digest(bridge)


def test_push_to_hub_uploads_config_and_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    uploads: list[set[str]] = []

    def upload(_self: HfApi, *, folder_path: str, **_: Any) -> None:
        uploads.append({path.name for path in Path(folder_path).iterdir()})
        uploaded = VisionBridge.from_pretrained(folder_path)
        assert uploaded.config == SMALL

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/bridge"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    VisionBridge(SMALL).push_to_hub("me/bridge")
    assert uploads == [{"config.json", "model.safetensors", "README.md"}]


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    VisionBridge(SMALL).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"gate": 1}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        VisionBridge.from_pretrained(tmp_path)


def test_incomplete_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    VisionBridge(SMALL).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "rank": 96}))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        VisionBridge.from_pretrained(tmp_path)
    broken = VisionBridge(SMALL)
    torch.nn.init.constant_(broken.gate, float("nan"))
    broken.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"weight bridge\.gate is NaN"):
        VisionBridge.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "surprise": 1}))
    with pytest.raises(ValueError, match="surprise"):
        VisionBridge.from_pretrained(tmp_path)


def test_a_missing_bridge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        VisionBridge.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nobody/has-this"):
        VisionBridge.from_pretrained("nobody/has-this")
    with pytest.raises(OSError, match="/no/such/folder"):
        VisionBridge.from_pretrained("/no/such/folder")


def test_a_bridge_of_other_models_is_refused_by_name(tmp_path: Path) -> None:
    VisionBridge().save_pretrained(tmp_path / "released")
    with pytest.raises(ValueError, match=r"4096.*3584.*miniature-source \(256\)"):
        resolve_bridge(tmp_path / "released", FAMILIES["miniature"])
    config = BridgeConfig.for_family(FAMILIES["miniature"], source_model="Qwen3-VL-2B")
    with pytest.raises(ValueError, match=r"Qwen3-VL-2B.*miniature-source"):
        resolve_bridge(VisionBridge(config), FAMILIES["miniature"])


def test_blend_replace_puts_the_levels_in_the_baselines_place(
    levels_and_baseline: tuple[list[torch.Tensor], torch.Tensor],
) -> None:
    levels, baseline = levels_and_baseline
    shapes = {
        "source_dim": 256,
        "target_dim": 224,
        "rank": 16,
        "query_dim": 16,
        "init": "random",
        "clamp": 1e6,
    }
    adds, replaces = (VisionBridge(BridgeConfig(**shapes, blend=blend)) for blend in ("add", "replace"))
    with torch.no_grad():
        replaces.load_state_dict(adds.state_dict())
        summed, placed = adds(levels, baseline).features, replaces(levels, baseline).features
        half = replaces(levels, baseline, 0.5).features
        parts, _ = replaces.contributions(levels, baseline)
    torch.testing.assert_close(placed, summed - baseline, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(half, (baseline + placed) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sum(parts), placed - baseline, atol=1e-4, rtol=1e-4)
    fresh = VisionBridge(BridgeConfig(**shapes | {"init": "zero"}, blend="replace"))
    assert torch.equal(fresh(levels, baseline).features, baseline)
    with pytest.raises(ValueError, match="blend"):
        BridgeConfig(blend="swap")


def test_the_shipped_bridge_is_the_miniatures_default(
    levels_and_baseline: tuple[list[torch.Tensor], torch.Tensor],
) -> None:
    bridge, name = resolve_bridge(None, FAMILIES["miniature"])
    folder = WEIGHTS / "bridge-miniature"
    assert name == "bridge-miniature, as shipped"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    levels, baseline = levels_and_baseline
    with torch.no_grad():
        assert not torch.equal(bridge(levels, baseline).features, baseline)
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


def test_a_bridge_prints_its_parameters_and_levels() -> None:
    printed = repr(VisionBridge(SMALL))
    assert "early/mid/late, 256 to 224" in printed
    assert f"{count_parameters(VisionBridge(SMALL)) / 1e6:.2f} M parameters" in printed


def test_a_misspelt_bridge_is_refused_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VisionBridge, "from_pretrained", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="bridge 'nonexist' is no folder"):
        resolve_bridge("nonexist", FAMILIES["miniature"])


@pytest.mark.parametrize("name", ["miniature", "qwen"])
def test_the_card_of_a_bridge_loads_it_as_it_says(name: str, tmp_path: Path) -> None:
    bridge = VisionBridge(BridgeConfig.for_family(FAMILIES[name]))
    bridge.save_pretrained(tmp_path, model_card_kwargs={"training": "2 steps", "results": "letters +1"})
    card = ModelCard.load(tmp_path / "README.md")
    assert f'family="{name}"' in card.text
    assert "2 steps" in card.text
    assert "letters +1" in card.text
    wanted = None if name == "miniature" else ["Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"]
    assert (card.data.library_name, card.data.base_model) == ("qwen-vision-bridge", wanted)
    assert resolve_bridge(tmp_path, FAMILIES[name])[1] == str(tmp_path)
