"""LoRA files: where they lie, on disk or on the hub, and what is in them."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io import folder_digest, parse_object, read_json
from .checkpoints import locate
from .checks import PICKLE_SUFFIXES
from .hub import hub_file, hub_files, is_hub_id


def parse_lora(text: str) -> tuple[str, float]:
    """A LoRA as a command line gives it, `FILE[:WEIGHT]`: a file, a folder or a hub id, and its weight."""
    location, colon, weight = text.rpartition(":")
    try:
        return (location, check_weight(float(weight))) if colon and location else (text, 1.0)
    except ValueError:
        return text, 1.0


def check_weight(weight: object) -> float:
    """A finite weight of a LoRA.

    Raises:
        ValueError: something else.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(float(weight)):
        raise ValueError(f"a LoRA's weight is a finite number, not {weight!r}")
    return float(weight)


def find_lora(location: str | Path, weight_name: str | None = None) -> Path:
    """The safetensors file of a LoRA: the file itself, one in a folder, or one in a repository of the hub.

    Args:
        location: a file, a folder, a hub id, or a hub id and a file in it, `owner/name/file.safetensors`.
        weight_name: the file in a folder or repository that has several.

    Raises:
        FileNotFoundError: no such file. ValueError: a pickled file, or several to choose from.
        OSError: no connection to the hub and no copy.
    """
    location = locate(str(location))
    path, text = Path(location).expanduser(), location
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path} is a pickled file, which is never loaded: convert it to safetensors")
    if path.is_file():
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        return path / _choose(text, names, weight_name)
    owner, _, rest = text.partition("/")
    name, _, file = rest.partition("/")
    if file.endswith(".safetensors"):
        text, weight_name = f"{owner}/{name}", file
    if is_hub_id(text) and not text.endswith(".safetensors"):
        names = [weight_name] if weight_name else hub_files(text, ".safetensors")
        return hub_file(text, _choose(text, names, weight_name))
    raise FileNotFoundError(f"no LoRA at {location}: give a safetensors file, a folder or a hub id")


def _choose(location: str, names: list[str], weight_name: str | None) -> str:
    if weight_name is not None and weight_name not in names:
        raise FileNotFoundError(f"{location} has no {weight_name}; it has {', '.join(names) or 'no LoRA'}")
    if weight_name is None and len(names) != 1:
        what = f"{len(names)} LoRAs ({', '.join(names[:4])}): name one" if names else "no safetensors file"
        raise FileNotFoundError(f"{location} has {what}")
    return weight_name or names[0]


def lora_revision(location: str | None) -> str | None:
    """Identify a LoRA's file by its content, or by its size and modification time above 64 MB."""
    if location is None:
        return None
    path = find_lora(location)
    return folder_digest(path.parent, [path])


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and the peft config in its metadata or beside it.

    Raises:
        ValueError: no safetensors file, or one that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download it again") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    config: dict[str, Any] = {}
    if "lora_adapter_metadata" in metadata:  # diffusers' save_lora_weights
        stated = parse_object(metadata["lora_adapter_metadata"].encode(), f"{path}: its metadata")
        config = {name.removeprefix("transformer."): value for name, value in stated.items()}
    elif (path.parent / "adapter_config.json").is_file():
        config = read_json(path.parent / "adapter_config.json")
    return tensors, config
