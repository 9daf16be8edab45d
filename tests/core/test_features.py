"""The store of features on disk: damage, sharing, ownership."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_vision_bridge.features import FeatureCache, FeatureStore, Item, read_shard, shard_names

HEADER = {"grids": [[2, 3]], "provenance": {"model": "small", "revision": "1", "dtype": "float32"}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, 6, 256, generator=generator) for name in ("early", "mid", "late", "merged")}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_cache_entry_is_deleted_and_rebuilt(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path)
    path = cache.put(HEADER, tensors())
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-100] ^= 0xFF  # a bit that the format itself would not miss
        path.write_bytes(data)
    elif damage == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert cache.get(HEADER) is None
    assert str(path) in caplog.text
    assert not path.exists()
    cache.put(HEADER, tensors())
    assert cache.get(HEADER) is not None


def test_everything_that_changes_features_changes_their_place(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    place = cache.path(HEADER)
    provenance = HEADER["provenance"]
    assert place == cache.path({"provenance": dict(reversed(provenance.items())), "grids": [[2, 3]]})
    for changed in provenance:
        assert cache.path({**HEADER, "provenance": {**provenance, changed: "other"}}) != place
    assert cache.path({**HEADER, "grids": [[3, 2]]}) != place


def write_and_read(folder: str) -> int:
    """Put and get the same entries as all the other processes; how many came back right."""
    cache, good = FeatureCache(folder), 0
    for number in range(20):
        header = {**HEADER, "images": number % 4}
        cache.put(header, tensors(number % 4))
        shard = cache.get(header)
        good += shard is not None and torch.equal(shard.tensors["late"], tensors(number % 4)["late"])
    return good


def test_processes_may_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(write_and_read, [str(tmp_path)] * 2) == [20, 20]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_a_store_gives_back_the_rows_of_each_item(tmp_path: Path) -> None:
    items = [
        Item({"x": torch.full((n, 2), float(n)), "y": torch.zeros(1, 3)}, {"name": n}) for n in (3, 1, 2)
    ]
    store = FeatureStore(tmp_path, "items", {"model": "a"})
    plan = shard_names(3, size=2)
    store.begin(plan)
    with pytest.raises(FileNotFoundError):
        store.shards()
    store.put(plan[0], None, items[:2])
    store.put(plan[1], None, items[2:])
    store.finish(plan)
    shards = FeatureStore(tmp_path).shards()
    rows = [row for shard in shards for row in shard.split("x")]
    assert [row.tolist() for row in rows] == [item.tensors["x"].tolist() for item in items]
    assert [item["name"] for shard in shards for item in shard.items] == [3, 1, 2]


def test_a_shard_with_a_flipped_bit_fails_its_checksum(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "items", {})
    store.put("features-00000.safetensors", None, [Item({"x": torch.ones(4, 4)}, {})])
    path = tmp_path / "features-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    read_shard(path)
    with pytest.raises(OSError, match="checksum"):
        read_shard(path, verify=True)
