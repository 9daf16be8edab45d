"""The index of a feature folder: which images it is of, and which files are its own.

A shard is listed before it is written, and only listed files are replaced or removed: a run that is killed at
any point can go on, and a file that somebody else put there stays. Nothing heavy is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .io import first_difference, write_json
from .specs import read_json

FORMAT = "qwen-vision-bridge/feature-folder/2"
INDEX = "index.json"
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SHARD_IMAGES = 64
_SHARD = re.compile(r"features-\d{5,}\.safetensors")


def list_shards(images: Path, size: int = SHARD_IMAGES) -> dict[str, list[str]]:
    """Shard file → the images in it, as paths below the folder.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder of images: {images}")
    names = sorted(
        path.relative_to(images).as_posix()
        for path in images.rglob("*")
        if path.suffix.lower() in ENDINGS and path.is_file()
    )
    if not names:
        raise FileNotFoundError(f"{images} holds no image ({', '.join(sorted(ENDINGS))})")
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return {f"features-{number:05d}.safetensors": part for number, part in enumerate(parts)}


def read_index(output: Path) -> dict[str, Any] | None:
    """The index of a feature folder, `complete` or not; None where there is none.

    Raises:
        ValueError: an `index.json` of another format.
    """
    if not os.path.lexists(output / INDEX):
        return None
    index = read_json(output / INDEX)
    if index.get("format") != FORMAT or not all(map(_SHARD.fullmatch, index["shards"])):
        raise ValueError(
            f"{output / INDEX} is of another program or version (format {index.get('format')!r}, needed is "
            f"{FORMAT!r}): give another --output"
        )
    return index


def check_output(
    output: Path, images: Path, shards: Iterable[str], fingerprint: Mapping[str, str] | None = None
) -> list[str]:
    """Refuse an output in which features of these images would replace anything but features of theirs.

    Args:
        shards: names of the files to write.
        fingerprint: what the features will be made from; None does not look at that.

    Returns:
        The shards that the output's own index lists.

    Raises:
        ValueError: it holds features of another folder, of other models or settings, or of another version.
        FileExistsError: a file that its index does not list is where a shard would go.
    """
    index = read_index(output)
    owned = index["shards"] if index is not None else []
    if index is not None and index["folder"] != str(images.resolve()):
        raise ValueError(f"{output} holds features of the images in {index['folder']}: give another --output")
    if index and fingerprint and (difference := first_difference(index["fingerprint"], fingerprint)):
        raise ValueError(
            f"{output} holds features of other models or settings ({difference}): give another --output"
        )
    for name in shards:
        if name not in owned and os.path.lexists(output / name):
            raise FileExistsError(
                f"{output} holds {name}, which is not of this run: move it away, or give another --output"
            )
    return owned


def write_index(
    output: Path,
    images: Path,
    shards: Iterable[str],
    fingerprint: Mapping[str, str],
    features: Iterable[str],
    found: Mapping[str, Any] | None = None,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Write the index of shards to come or, with `found` (image → shard and grid), of finished ones."""
    index = {
        "format": FORMAT,
        "complete": found is not None,
        "folder": str(images.resolve()),
        "features": list(features),
        "fingerprint": dict(fingerprint),
        "shards": sorted(shards),
        "images": dict(found or {}),
        "skipped": dict(skipped or {}),
    }
    write_json(output / INDEX, index)
