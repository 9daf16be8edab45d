"""Calibration finds a linear map that is there and ignores one that is not, from sums over a stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge
from qwen_vision_bridge.training.calibration import Calibration, Tokens, calibrate, fit, normalised

CONFIG = BridgeConfig(source_dim=24, target_dim=20, rank=8, heads=4, query_dim=8)


def tokens_of_rank(count: int = 4000, noise: float = 0.0, rank: int = 4, seed: int = 0) -> Tokens:
    """Levels, and features that two of them give through maps of low rank, in channels of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(count, 24, generator=generator) for _ in range(3)]
    maps = torch.Generator().manual_seed(99)
    sizes = torch.logspace(-0.5, 0.5, 20)
    features = sum(
        normalised(level) @ torch.randn(24, rank, generator=maps) @ torch.randn(rank, 20, generator=maps)
        for level in levels[:2]
    )
    features = (features + noise * torch.randn(count, 20, generator=generator)) * sizes
    return Tokens(levels, features / features.square().mean(-1, keepdim=True).sqrt())


def chunks_of(tokens: Tokens, size: int) -> Iterator[Tokens]:
    for start in range(0, len(tokens.baseline), size):
        part = slice(start, start + size)
        highres = None if tokens.highres is None else tokens.highres[part]
        yield Tokens([level[part] for level in tokens.levels], tokens.baseline[part], highres)


def calibrated(tokens: Tokens, config: BridgeConfig = CONFIG, **options: object) -> Calibration:
    return calibrate(config, lambda: chunks_of(tokens, 100), **options)


def out(bridge: VisionBridge, tokens: Tokens) -> Tensor:
    with torch.no_grad():
        return bridge([level[None] for level in tokens.levels], tokens.baseline[None]).features[0]


def test_a_calibrated_bridge_gives_the_targets_features() -> None:
    found, fresh = calibrated(tokens_of_rank()), tokens_of_rank(500, seed=1)
    strange = fresh._replace(baseline=fresh.baseline.roll(1, 0))  # the size of a token is the baseline's
    size = strange.baseline.square().mean(-1, keepdim=True).sqrt()
    error = (out(found.bridge, strange) - size * fresh.baseline).square().mean()
    assert found.bridge.config.blend == "replace"
    assert found.explained > 0.8  # the rest is the size of a token, which no linear map gives
    assert error < 0.3 * fresh.baseline.square().mean()


def test_levels_that_say_nothing_explain_nothing_held_out() -> None:
    tokens = tokens_of_rank()
    strangers = [level.roll(7, 0) for level in tokens.levels]
    assert abs(calibrated(tokens._replace(levels=strangers)).explained) < 0.02


def test_with_highres_features_the_update_is_the_difference() -> None:
    tokens = tokens_of_rank()
    unseen = 3 * torch.randn(tokens.baseline.shape, generator=torch.Generator().manual_seed(5))
    blurred = tokens._replace(baseline=unseen, highres=unseen + 0.3 * tokens.baseline)
    found = calibrated(blurred)
    assert found.bridge.config.blend == "add"  # the baseline holds what no level knows
    before = (unseen - blurred.highres).square().mean()
    after = (out(found.bridge, blurred) - blurred.highres).square().mean()
    assert after < 0.5 * before


def test_the_rank_that_is_there_is_found_by_cross_validation() -> None:
    found = calibrated(tokens_of_rank(noise=3.0), ranks=(4, 8))
    assert found.rank == 4
    assert found.bridge.config.rank == 4
    assert set(found.by_rank) == {4, 8}


def test_sums_over_chunks_equal_one_regression_over_all_tokens() -> None:
    tokens = tokens_of_rank(800, noise=0.5)
    x = torch.cat([normalised(level) for level in tokens.levels], 1).double()
    y = tokens.baseline.double()
    pairs = fit(x.T @ x, x.T @ y, [24, 24, 24], 20, 1e-9)  # full rank
    whole = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(torch.cat([d @ u for d, u in pairs]), whole, atol=1e-4, rtol=1e-3)


def test_a_calibrated_bridge_loads_and_is_identity_at_zero(tmp_path: object) -> None:
    tokens = tokens_of_rank()
    found = calibrated(tokens)
    found.bridge.save_pretrained(tmp_path)
    loaded = VisionBridge.from_pretrained(tmp_path)
    assert torch.equal(out(loaded, tokens), out(found.bridge, tokens))
    levels, baseline = [level[None] for level in tokens.levels], tokens.baseline[None]
    assert torch.equal(loaded(levels, baseline, strength=0).features, baseline)


def test_calibrated_weights_have_the_size_of_a_new_bridges() -> None:
    tokens = tokens_of_rank(noise=1.0)
    bridge = calibrated(tokens).bridge
    for level, down in zip(tokens.levels, bridge.downs, strict=True):
        latents = down(normalised(level))
        assert 0.5 < latents.square().mean().sqrt() < 2
    assert all(up.weight.abs().max() < 10 for up in bridge.ups)


def test_what_the_bases_leave_out_is_reported() -> None:
    tokens = tokens_of_rank()
    assert min(calibrated(tokens).kept.values()) > 0.999
    kept = calibrated(tokens, components=8).kept
    assert 0.2 < kept["early"] < 0.9  # eight of 24 directions of noise
    assert kept["features"] > 0.99  # two maps of rank 4


@pytest.mark.parametrize(
    ("tokens", "config", "message"),
    [
        (Tokens([], torch.zeros(0, 20)), CONFIG, "no tokens"),
        (tokens_of_rank(300), CONFIG, "at least 5 chunks"),
        (tokens_of_rank(800), BridgeConfig(source_dim=32, target_dim=20, rank=8, query_dim=8), "widths"),
        (tokens_of_rank(800), BridgeConfig(source_dim=24, target_dim=20, rank=None, query_dim=8), "low rank"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tokens: Tokens, config: BridgeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(tokens, config)


def test_a_stream_is_read_twice_and_never_kept() -> None:
    tokens, started = tokens_of_rank(), []

    def stream() -> Iterator[Tokens]:
        started.append(1)
        yield from chunks_of(tokens, 100)

    calibrate(CONFIG, stream)
    assert len(started) == 2
