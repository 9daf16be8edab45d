"""Results on disk: what made them, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

KEY_VERSION = 2
"""Raised when keys are made of other things than before, so that what was kept under them is made anew."""
PACKAGES = ("qwen-vision-bridge", "torch", "transformers", "diffusers", "accelerate", "bitsandbytes")


def provenance(seeds: Sequence[int], device: str, **models: Any) -> dict[str, Any]:
    """What every results file says about how it was made: command, seeds, models, versions, device, date."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": list(seeds),
        **models,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def digest_of(data: Any) -> str:
    """Short digest of plain data, for keys of things made from it.

    Raises:
        TypeError: it holds something whose content is not known, such as a function or a tensor: two of them
            could look alike and differ.
    """
    text = json.dumps([KEY_VERSION, data], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be part of a key that results are kept under")


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first key in which two accounts of how something was made differ, in words; "" where none does."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            return f"{key} {found.get(key)!r}, now {wanted.get(key)!r}"
    return ""


def write_whole(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a file beside `path` and rename it in, making the folder if need be.

    Raises:
        OSError: the folder cannot be written to; it says which.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)  # mkstemp's own mode hides the file from everyone else
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def write_json(path: str | Path, data: Any) -> Path:
    """Write indented JSON; NaN and infinity are refused, since no other reader takes them."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_image(path: str | Path, image: Image.Image) -> Path:
    """Write an image in the format of the path's ending."""
    return write_whole(path, lambda file: image.save(file))
