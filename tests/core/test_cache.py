"""Vision caches: round trips and splitting, and the statistics against known values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vision_bridge.cache import VisionCache, compare, linear_cka


def vision_cache(seed: int = 0, **provenance: str) -> VisionCache:
    generator = torch.Generator().manual_seed(seed)
    features = {
        name: torch.randn(1, 18, 256, generator=generator) for name in ("early", "mid", "late", "merged")
    }
    return VisionCache(features, ((2, 3), (3, 4)), {"model": "small", **provenance})


def target() -> VisionCache:
    return VisionCache({"vision": torch.randn(1, 18, 224)}, ((2, 3), (3, 4)), {"model": "target"})


def test_a_saved_cache_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache = vision_cache()
    loaded = VisionCache.load(cache.save(tmp_path / "a.safetensors"))
    assert all(torch.equal(cache.features[name], loaded.features[name]) for name in cache.features)
    assert (loaded.grids, dict(loaded.provenance)) == (cache.grids, dict(cache.provenance))
    assert loaded.loaded_from == tmp_path / "a.safetensors"


def test_half_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache = vision_cache().to(dtype=torch.bfloat16)
    assert torch.equal(VisionCache.load(cache.save(tmp_path / "a")).early_features, cache.early_features)


def test_several_images_split_in_order() -> None:
    cache = vision_cache()
    first, second = cache.split()
    assert (first.grid, second.grid) == ((2, 3), (3, 4))
    assert torch.equal(torch.cat([first.mid_features, second.mid_features], 1), cache.mid_features)
    with pytest.raises(ValueError, match="2 images"):
        _ = cache.grid


def test_features_that_do_not_fit_their_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 18, D\)"):
        replace(vision_cache(), features={"early": torch.zeros(1, 17, 4)})


def test_a_target_has_no_levels() -> None:
    with pytest.raises(AttributeError, match="vision_features"):
        _ = target().early_features


def test_compare_reports_match_dimensions_and_ratio() -> None:
    comparison = compare(vision_cache(), target())
    assert (comparison.token_match, comparison.dimension_mismatch) == (True, True)
    assert comparison.dimension_ratio == pytest.approx(256 / 224)
    assert list(comparison.levels) == ["early", "mid", "late", "merged", "baseline"]
    assert comparison.levels["baseline"].cka == pytest.approx(1)


def test_cka_matches_the_textbook_and_ignores_rotation() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 12)), rng.normal(size=(50, 7)) + 0.5
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    assert linear_cka(torch.tensor(x), torch.tensor(3 * x @ rotation + 2)) == pytest.approx(1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(yc.T @ xc) ** 2 / (np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc))
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="50 and 49"):
        linear_cka(torch.tensor(x), torch.tensor(y[1:]))


def test_outlier_channels_are_counted() -> None:
    cache = vision_cache()
    cache.features["early"][..., :8] *= 100
    levels = compare(cache, target()).levels
    assert levels["early"].outlier_share == pytest.approx(8 / 256)
    assert levels["mid"].outlier_share == 0


def test_caches_and_comparisons_print_shapes_and_grids() -> None:
    assert "early (1, 18, 256)" in repr(vision_cache())
    assert "grids 2×3, 3×4; of small" in repr(vision_cache())
    lines = repr(compare(vision_cache(), target())).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["early", "mid", "late", "merged", "baseline"]


def test_features_of_two_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="of different images"):
        compare(vision_cache(images="a"), replace(target(), provenance={"images": "b"}))
    assert compare(vision_cache(images="a"), replace(target(), provenance={"images": "a"})).token_match
    with pytest.raises(ValueError, match="the grids differ"):
        compare(vision_cache(), replace(target(), grids=((3, 2), (3, 4))))
