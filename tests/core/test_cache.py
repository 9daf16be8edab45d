"""Vision caches: round trips, damage, sharing; and the statistics against known values."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen_vision_bridge.cache import FeatureCache, VisionCache, compare, linear_cka


def made(seed: int = 0, **provenance: str) -> VisionCache:
    generator = torch.Generator().manual_seed(seed)
    features = {
        name: torch.randn(1, 18, 256, generator=generator) for name in ("early", "mid", "late", "merged")
    }
    return VisionCache(features, ((2, 3), (3, 4)), {"model": "small", **provenance})


def target() -> VisionCache:
    return VisionCache({"vision": torch.randn(1, 18, 224)}, ((2, 3), (3, 4)), {"model": "target"})


def test_a_saved_cache_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache = made()
    loaded = VisionCache.load(cache.save(tmp_path / "a.safetensors"))
    assert all(torch.equal(cache.features[name], loaded.features[name]) for name in cache.features)
    assert (loaded.grids, dict(loaded.provenance)) == (cache.grids, dict(cache.provenance))
    assert loaded.loaded_from == tmp_path / "a.safetensors"


def test_half_precision_comes_back_too(tmp_path: Path) -> None:
    cache = made().to(dtype=torch.bfloat16)
    assert torch.equal(VisionCache.load(cache.save(tmp_path / "a")).early_features, cache.early_features)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_entry_is_reported_deleted_and_rebuilt(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, cache = FeatureCache(tmp_path), made()
    path = store.put(cache)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-100] ^= 0xFF  # a bit that the format itself would not miss
        path.write_bytes(data)
    elif damage == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert store.get(cache.provenance, cache.grids) is None
    assert "rebuilding" in caplog.text
    assert str(path) in caplog.text
    assert not path.exists()
    store.put(cache)
    assert store.get(cache.provenance, cache.grids) is not None


def test_everything_that_changes_features_changes_their_place(tmp_path: Path) -> None:
    store, cache = FeatureCache(tmp_path), made(revision="1", dtype="float32", images="abc")
    place = store.path(cache.provenance, cache.grids)
    assert place == store.path(dict(reversed(cache.provenance.items())), cache.grids)
    for changed in ("model", "revision", "dtype", "images"):
        assert store.path({**cache.provenance, changed: "other"}, cache.grids) != place
    assert store.path(cache.provenance, ((3, 2), (3, 4))) != place


def write_and_read(folder: str, number: int) -> int:
    """In a process of its own: put and get the same entries as all the others."""
    store, good = FeatureCache(folder), 0
    for round_number in range(20):
        cache = made(round_number % 4, images=str(round_number % 4))
        store.put(cache)
        found = store.get(cache.provenance, cache.grids)
        good += found is not None and torch.equal(found.late_features, cache.late_features)
    return good


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(write_and_read, [(str(tmp_path), 0), (str(tmp_path), 1)]) == [20, 20]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_several_images_split_in_order_and_have_no_single_grid() -> None:
    cache = made()
    first, second = cache.split()
    assert (first.grid, second.grid) == ((2, 3), (3, 4))
    assert torch.equal(torch.cat([first.mid_features, second.mid_features], 1), cache.mid_features)
    with pytest.raises(ValueError, match="2 images"):
        _ = cache.grid


def test_features_that_do_not_fit_their_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 18, D\)"):
        replace(made(), features={"early": torch.zeros(1, 17, 4)})


def test_asking_a_target_for_levels_says_what_it_has() -> None:
    with pytest.raises(AttributeError, match=r"target has vision_features, not early_features"):
        _ = target().early_features


def test_compare_reports_match_dimensions_and_ratio() -> None:
    comparison = compare(made(), target())
    assert (comparison.token_match, comparison.dimension_mismatch) == (True, True)
    assert comparison.dimension_ratio == pytest.approx(256 / 224)
    assert list(comparison.levels) == ["early", "mid", "late", "merged", "baseline"]
    assert comparison.levels["baseline"].cka == pytest.approx(1)


def test_cka_is_1_under_rotation_and_scale_and_matches_the_textbook_formula() -> None:
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
    cache = made()
    cache.features["early"][..., :8] *= 100
    levels = compare(cache, target()).levels
    assert levels["early"].outlier_share == pytest.approx(8 / 256)
    assert levels["mid"].outlier_share == 0
