"""Only the tower is read, and what is read is the checkpoint's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vision_bridge.loading.checkpoints import LocalCheckpoint
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.registry import MODELS
from qwen_vision_bridge.loading.towers import (
    TOWER_PREFIX,
    load_processor,
    load_tower,
    load_whole,
    place,
    quantise_blocks,
    require_cuda_for_8bit,
)
from tests.conftest import shard_checkpoint

SOURCE, TARGET = MODELS["miniature-source"], MODELS["miniature-target"]


def folder_spec(folder: Path, role: str = "source") -> Any:
    return getattr(resolve_family("miniature", **{role: folder}), role)


def tower_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {TOWER_PREFIX.sub("", k): v.float() for k, v in load_file(path).items() if TOWER_PREFIX.match(k)}


@pytest.mark.parametrize("spec", [SOURCE, TARGET], ids=["source", "target"])
def test_a_tower_has_the_checkpoints_weights_and_not_random_ones(
    spec: Any, source_folder: Path, editor_folder: Path
) -> None:
    loaded = load_tower(spec).model.state_dict()
    folder = source_folder if spec is SOURCE else editor_folder / "text_encoder"
    expected = tower_tensors(folder / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [SOURCE, TARGET], ids=["source", "target"])
def test_a_tower_computes_what_the_whole_model_computes(spec: Any, dtype: torch.dtype) -> None:
    """Rotary frequencies included, which are in no checkpoint and keep 32 bits in any."""
    tower, whole = load_tower(spec, dtype=dtype).model, load_whole(spec, dtype=dtype).model.visual
    width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    pixels, grid = torch.randn(24 * 32, width).to(dtype), torch.tensor([[1, 24, 32]])
    one, other = tower(pixels, grid), whole(pixels, grid)
    assert one.pooler_output.dtype is dtype
    assert torch.equal(one.pooler_output, other.pooler_output)
    levels = [getattr(output, "deepstack_features", None) or () for output in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*levels, strict=True))
    assert all(buffer.dtype is torch.float32 for buffer in tower.buffers())


@pytest.mark.parametrize("old_names", [False, True], ids=["model.visual", "visual"])
def test_shards_without_tower_tensors_are_never_opened(
    tmp_path: Path, source_folder: Path, old_names: bool
) -> None:
    weight_map = shard_checkpoint(source_folder, tmp_path, 5, old_names)
    needed = {shard for name, shard in weight_map.items() if TOWER_PREFIX.match(name)}
    others = set(weight_map.values()) - needed
    assert others
    for shard in others:
        (tmp_path / shard).write_bytes(b"garbage")
    assert (
        load_tower(folder_spec(tmp_path)).model.state_dict().keys()
        == load_tower(SOURCE).model.state_dict().keys()
    )


def test_the_bytes_read_are_the_towers_and_the_headers(tmp_path: Path, source_folder: Path) -> None:
    shard_checkpoint(source_folder, tmp_path, 5)
    report = load_tower(folder_spec(tmp_path))
    tower_bytes = sum(tensor.nbytes for tensor in report.model.state_dict().values()) // 2  # bf16 on disk
    assert tower_bytes <= report.bytes_read <= tower_bytes + 30_000
    assert report.total_bytes > 1.4 * report.bytes_read


def test_a_missing_shard_is_named(tmp_path: Path, source_folder: Path) -> None:
    weight_map = shard_checkpoint(source_folder, tmp_path, 4)
    lost = next(shard for name, shard in weight_map.items() if TOWER_PREFIX.match(name))
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost):
        load_tower(folder_spec(tmp_path))


def test_a_truncated_shard_is_named(tmp_path: Path, source_folder: Path) -> None:
    weight_map = shard_checkpoint(source_folder, tmp_path, 4)
    cut = next(shard for name, shard in weight_map.items() if TOWER_PREFIX.match(name))
    (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:5000])
    with pytest.raises(OSError, match=rf"{cut} is damaged"):
        load_tower(folder_spec(tmp_path))


def test_a_missing_or_foreign_tower_tensor_is_an_error(tmp_path: Path, source_folder: Path) -> None:
    shard_checkpoint(source_folder, tmp_path, 1)
    file, index = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "model.safetensors.index.json"
    tensors = load_file(file)
    tensors["model.visual.surprise"] = tensors.pop("model.visual.patch_embed.proj.bias")
    save_file(tensors, file)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    says = r"1 missing \(first: patch_embed\.proj\.bias\), 1 unexpected \(first: surprise\)"
    with pytest.raises(ValueError, match=says):
        load_tower(folder_spec(tmp_path))


def test_a_checkpoint_with_two_towers_is_refused(tmp_path: Path, source_folder: Path) -> None:
    tensors = load_file(source_folder / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("model.visual.")}
    other = {name.removeprefix("model."): tensor + 1 for name, tensor in own.items()}
    save_file(tensors | other, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"{len(own)} tensors under `visual\.` and under `model\.visual\.`"):
        load_tower(folder_spec(tmp_path))


def test_a_hub_model_with_the_newer_processor_file_alone_loads(
    tmp_path: Path, source_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 writes `processor_config.json` and no `preprocessor_config.json`."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--acme--full" / "snapshots" / ("a" * 40)
    shutil.copytree(source_folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not (snapshot / "preprocessor_config.json").exists()
    (tmp_path / "models--acme--full" / "refs").mkdir()
    (tmp_path / "models--acme--full" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    by_id, by_folder = (load_processor(location) for location in ("acme/full", str(source_folder)))
    assert by_id.to_dict() == by_folder.to_dict()


def test_a_whole_model_that_lacks_tensors_is_refused(tmp_path: Path, source_folder: Path) -> None:
    """transformers fills them with random values and a table of warnings."""
    shard_checkpoint(source_folder, tmp_path, 1, old_names=True)
    file, index = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "model.safetensors.index.json"
    whole = load_file(file)
    load_whole(folder_spec(tmp_path))
    layer = {name: tensor for name, tensor in whole.items() if "layers.1." in name}
    first = min(layer)
    wrong = {
        f"{len(layer)} missing": {name: tensor for name, tensor in whole.items() if name not in layer},
        "1 unexpected": whole | {"model.surprise": torch.zeros(2)},
        "1 of another shape": whole | {first: torch.zeros(3)},
    }
    for says, tensors in wrong.items():
        save_file(tensors, file, {"format": "pt"})
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
        with pytest.raises(ValueError, match=rf"{says} \(first: model\.") as caught:
            load_whole(folder_spec(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tower_or_safetensors_is_refused(tmp_path: Path, source_folder: Path) -> None:
    config = (source_folder / "config.json").read_text()
    for name in ("text", "pickled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "text" / "model.safetensors")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="no vision tower"):
        load_tower(folder_spec(tmp_path / "text"))
    with pytest.raises(ValueError, match="only pickled weights"):
        load_tower(folder_spec(tmp_path / "pickled"))


def test_a_checkpoint_of_another_size_than_its_spec_is_refused(source_folder: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="depth 6 instead of 27"):
        load_tower(replace(MODELS["Qwen3-VL-8B"], repo=str(source_folder)))


def test_the_revision_of_a_folder_follows_its_bytes(tmp_path: Path, source_folder: Path) -> None:
    shard_checkpoint(source_folder, tmp_path, 2)
    before = LocalCheckpoint(tmp_path).revision
    assert LocalCheckpoint(tmp_path).revision == before
    file = tmp_path / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert re.fullmatch(r"local:[0-9a-f]{16}", before)
    assert LocalCheckpoint(tmp_path).revision != before


def test_8_bit_without_cuda_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device.*load_in_8bit=False"):
        require_cuda_for_8bit("cpu")


def test_an_8_bit_tower_stays_close_and_keeps_its_mergers() -> None:
    """bitsandbytes runs on CPUs too, which proves the replacement; only CUDA is offered to users."""
    exact, tower = load_tower(SOURCE).model, load_tower(SOURCE).model
    assert quantise_blocks(tower) == 4 * SOURCE.depth
    place(tower, "cpu", None)
    pixels, grid = torch.randn(24, 384), torch.tensor([[1, 4, 6]])
    expected, quantised = exact(pixels, grid).pooler_output, tower(pixels, grid).pooler_output
    assert tower.blocks[0].attn.qkv.weight.dtype is torch.int8
    assert tower.merger.linear_fc1.weight.dtype is torch.float32
    error = (quantised - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_device_map_auto_places_through_accelerate() -> None:
    tower = load_tower(SOURCE, device_map="auto").model
    assert next(tower.parameters()).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match='"auto" or None'):
        place(tower, "cpu", "balanced")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8_bit_loading_quantises_tower_and_language_model() -> None:
    tower = load_tower(SOURCE, "cuda", torch.bfloat16, load_in_8bit=True).model
    assert tower.blocks[0].mlp.linear_fc1.weight.dtype is torch.int8
    whole = load_whole(SOURCE, "cuda", torch.bfloat16, load_in_8bit=True)
    assert whole.model.language_model.layers[0].mlp.up_proj.weight.dtype is torch.int8
    assert whole.model.visual.blocks[0].mlp.linear_fc1.weight.dtype is torch.bfloat16
