"""Features on disk: safetensors shards below a folder, with an `index.json` that lists them.

A shard holds, field by field, the rows of its items one after the other; its header says what the features
were computed from. The index lists a shard before it is written, and only listed files are replaced or
removed: a run that is killed at any point resumes, and other people's files stay. torch is imported only when
a shard is read or written, so that a wrong folder is refused at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .io import atomic_save, first_difference, read_json, write_json
from .specs import cache_home

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = "qwen-vision-bridge/features/1"
INDEX = "index.json"
SHARD_ITEMS = 64
_SHARD = re.compile(r"features-\d{5,}\.safetensors")
Json = dict[str, Any]


class Item(NamedTuple):
    """The features of one image or training sample."""

    tensors: Mapping[str, Tensor]
    """(rows, width) by field; all items of a store have the same fields and widths."""
    meta: Mapping[str, object]
    """Plain data that goes into the header."""


class Shard(NamedTuple):
    """One file of features, memory-mapped."""

    path: Path
    header: Json
    tensors: dict[str, Tensor]
    """By field, the rows of all items."""

    @property
    def items(self) -> list[Json]:
        """`rows` by field of each item, and its own plain data."""
        return self.header["items"]

    def split(self, field: str) -> tuple[Tensor, ...]:
        """A field's rows, item by item."""
        return self.tensors[field].split([item["rows"][field] for item in self.items])


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> Path:
    """Write one file of features, whole or not at all."""
    text = json.dumps({**header, "checksum": _checksum(tensors)}, sort_keys=True)
    # One entry: safetensors writes several in any order, and equal shards have equal bytes.
    return atomic_save(tensors, path, {FORMAT: text})


def read_shard(path: Path, verify: bool = False) -> Shard:
    """Map one file of features; with `verify` its checksum is compared, which reads it in full.

    Raises:
        FileNotFoundError: no such file.
        OSError: it is cut short, or its content differs from its checksum.
        ValueError: it is a file of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            shard = Shard(path, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): delete it and extract again") from error
    if verify and header.get("checksum") != _checksum(shard.tensors):
        raise OSError(f"{path} is damaged (checksum mismatch): delete it and extract again")
    return shard


class FeatureStore:
    """The features of one list of items, from one set of models and settings, in one folder.

    To write: `claim`, `pending`, `begin`, then `put` for each pending shard, then `finish`. Several processes
    may put shards of their own between `begin` and `finish`. To read: `shards`.

    Args:
        folder: where the shards lie, with their index.
        origin: what the items are: a folder of images, a digest of samples.
        fingerprint: everything else that decides the features; None, before it is known, accepts any.
    """

    def __init__(
        self, folder: str | Path, origin: str = "", fingerprint: Mapping[str, object] | None = None
    ) -> None:
        self.folder, self.origin = Path(folder), origin
        self.fingerprint = None if fingerprint is None else dict(fingerprint)

    @property
    def index(self) -> Json | None:
        """The index, `complete` or not; None where there is none.

        Raises:
            ValueError: an `index.json` of another kind or version.
        """
        path = self.folder / INDEX
        if not os.path.lexists(path):
            return None
        index = read_json(path)
        if index.get("format") != FORMAT or not all(map(_SHARD.fullmatch, index["shards"])):
            raise ValueError(
                f"{path} is of another program or version (format {index.get('format')!r}, needed is "
                f"{FORMAT!r}): give another output folder"
            )
        return index

    def claim(self, shards: Iterable[str]) -> list[str]:
        """Refuse a folder in which these shards would replace anything but earlier ones of this store.

        Returns:
            The shards that the index lists already.

        Raises:
            ValueError: the folder holds features of other items, models or settings, or of another version.
            FileExistsError: a file that the index does not list is where a shard would go.
        """
        index = self.index
        if index is not None and index["origin"] != self.origin:
            raise ValueError(
                f"{self.folder} holds features of {index['origin']}, not of {self.origin}: give another "
                "output folder"
            )
        if index is not None and self.fingerprint is not None:
            difference = first_difference(index["fingerprint"], self.fingerprint)
            if difference:
                raise ValueError(
                    f"{self.folder} holds features of other models or settings ({difference}): give another "
                    "output folder"
                )
        listed = [] if index is None else index["shards"]
        for name in shards:
            if name not in listed and os.path.lexists(self.folder / name):
                raise FileExistsError(
                    f"{self.folder} holds {name}, which is not of this run: move it away, or give another "
                    "output folder"
                )
        return listed

    def pending(self, plan: Mapping[str, object]) -> list[str]:
        """Shards that are missing, damaged, or of other inputs than the plan says (shard → inputs)."""
        return [name for name, inputs in plan.items() if not self._is_done(name, inputs)]

    def begin(self, plan: Iterable[str]) -> None:
        """List the shards to come beside those that are there; the store counts as incomplete from now on."""
        plan = list(plan)
        self._write_index({*self.claim(plan), *plan}, complete=False)

    def put(self, shard: str, inputs: object, items: Sequence[Item], **notes: object) -> None:
        """Write one shard, with its inputs and notes in the header."""
        import torch

        fields = items[0].tensors if items else {}
        tensors = {field: torch.cat([item.tensors[field].cpu() for item in items]) for field in fields}
        listed = [
            {**item.meta, "rows": {field: len(rows) for field, rows in item.tensors.items()}}
            for item in items
        ]
        header = {"fingerprint": self.fingerprint, "inputs": inputs, "items": listed, **notes}
        write_shard(self.folder / shard, tensors, header)

    def headers(self, shards: Iterable[str]) -> dict[str, Json]:
        """The headers of shards that are all there."""
        return {name: read_shard(self.folder / name).header for name in shards}

    def finish(self, plan: Iterable[str], **notes: object) -> None:
        """Remove listed shards that are not in the plan, and write the complete index with some notes."""
        plan = list(plan)
        listed = {*self.claim(plan), *plan}
        if stale := listed - set(plan):
            self._write_index(listed, complete=False)
        for name in stale:
            (self.folder / name).unlink(missing_ok=True)
        self._write_index(plan, complete=True, **notes)

    def shards(self) -> list[Shard]:
        """All shards in order, memory-mapped.

        Raises:
            FileNotFoundError: the run that writes them did not end.
            OSError, ValueError: a damaged shard, a file of another kind.
        """
        index = self.index
        if index is None or not index["complete"]:
            raise FileNotFoundError(f"{self.folder} has no complete index: run the extraction to its end")
        return [read_shard(self.folder / name) for name in index["shards"]]

    def _is_done(self, name: str, inputs: object) -> bool:
        try:
            header = read_shard(self.folder / name).header
        except (OSError, ValueError):
            return False
        return header.get("inputs") == inputs and header.get("fingerprint") == self.fingerprint

    def _write_index(self, shards: Iterable[str], complete: bool, **notes: object) -> None:
        index = {
            "format": FORMAT,
            "complete": complete,
            "origin": self.origin,
            "fingerprint": self.fingerprint,
            "shards": sorted(shards, key=lambda name: (len(name), name)),
            **notes,
        }
        if index != self.index:
            write_json(self.folder / INDEX, index)


class FeatureCache:
    """A folder of single shards, each under a digest of its header; any number of processes may share it."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else cache_home() / "features"

    def path(self, header: Mapping[str, object]) -> Path:
        """Where features with this header lie, whether they are there or not."""
        key = hashlib.sha256(json.dumps([FORMAT, header], sort_keys=True).encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:34]}.safetensors"

    def get(self, header: Mapping[str, object]) -> Shard | None:
        """The features with this header, or None; a damaged file is deleted with a warning."""
        path = self.path(header)
        try:
            return read_shard(path, verify=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("feature cache: %s (extracting again)", error)
            path.unlink(missing_ok=True)
            return None

    def put(self, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
        """Store features under their header."""
        return write_shard(self.path(header), tensors, header)


def folder_store(
    images: str | Path, output: str | Path, fingerprint: Mapping[str, object] | None = None
) -> FeatureStore:
    """The store of the features of a folder of images."""
    return FeatureStore(output, f"the images in {Path(images).resolve()}", fingerprint)


def shard_names(items: int, size: int = SHARD_ITEMS) -> list[str]:
    """Names of the shards that `items` items take, `size` in each."""
    return [f"features-{number:05d}.safetensors" for number in range(-(-items // size))]


def _header(path: Path, metadata: Mapping[str, str] | None) -> Json:
    text = (metadata or {}).get(FORMAT)
    if text is None:
        raise ValueError(f"{path} holds no features of this version ({FORMAT})")
    return json.loads(text)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
