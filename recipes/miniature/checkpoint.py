"""Checkpoints of safetensors files below 15 MB and one JSON file that names them; nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_vision_bridge.io import write_json, write_whole

SHARD_BYTES = 14_000_000


def write_checkpoint(folder: Path, kinds: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write tensors of each kind as `kind-step-number.safetensors`, and state.json, which makes them count.

    Files of the checkpoint before are removed at the end, so that one is whole at every moment. Those that no
    state.json names are left alone, whatever their names.

    Args:
        kinds: kind → name → tensor, in the dtype to store.
        state: plain data, with the `step`.
    """
    path = folder / "state.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    named = {name for names in before.get("files", {}).values() for name in names}
    old = named | set(before.get("replaced", []))  # a kill may have left some of the one before that
    files = {
        kind: [
            _write_shard(folder / f"{kind}-{state['step']:07d}-{number:02d}.safetensors", shard)
            for number, shard in enumerate(_shards(tensors))
        ]
        for kind, tensors in kinds.items()
    }
    current = {name for names in files.values() for name in names}
    replaced = sorted(name for name in old - current if (folder / name).exists())
    write_json(path, {**state, "files": files, "replaced": replaced})
    for name in replaced:
        (folder / name).unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor] | None]] | None:
    """The state and the tensors of each kind, None for a kind that lacks a file; None without a state."""
    if not (folder / "state.json").exists():
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state, {kind: _read_shards(folder, names) for kind, names in state["files"].items()}


def fill(places: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names, which may differ in dtype and device.

    Raises:
        ValueError: the names differ.
    """
    if places.keys() != values.keys():
        raise ValueError(f"tensors of another model: {sorted(places.keys() ^ values.keys())[:5]} …")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = []
    size = SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > SHARD_BYTES:
            print(
                f"!!! {name} alone has {tensor.nbytes / 1e6:.1f} MB: its file will be that large", flush=True
            )
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda file: save_file(plain, file))
    return path.name


def _read_shards(folder: Path, names: list[str]) -> dict[str, Tensor] | None:
    if not all((folder / name).exists() for name in names):
        return None
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}
