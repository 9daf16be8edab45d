"""Tensors of a safetensors checkpoint by name, from a folder or, by byte ranges, from the hub.

Format: 8 bytes little-endian header length, a JSON header of dtypes, shapes and offsets, then the data
(huggingface/safetensors, README). A tensor can therefore be fetched without the rest of its shard.

huggingface_hub's own range reads do this worse: `get_safetensors_metadata` fetches 100 kB of every shard,
those without a tower tensor included; `HfFileSystem.cat_ranges` merges no neighbours, holds a whole range in
one response without a resume or progress, and takes the whole file from a server that ignores ranges.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes

from ..io import atomic_save, folder_digest, read_json
from ..specs import BUILTIN, ModelSpec, cache_home
from .checks import refuse_pickles
from .hub import hub_file, hub_range

logger = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MERGE_GAP = 64 * 1024  # bytes worth fetching to save a request


SHIPPED = Path(__file__).parents[1] / "weights" / "miniature"


def locate(repo: str) -> str:
    """Turn a `builtin:` location into the package's shipped weights; others pass unchanged.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    if not repo.startswith(BUILTIN):
        return repo
    name = repo.removeprefix(BUILTIN)
    path = SHIPPED / ("editor" if name == "target" else name)  # the editor's text encoder is the target
    if not path.exists():
        raise FileNotFoundError(f"no weights of the miniature in {path}: install the whole package")
    return str(path)


class Checkpoint(ABC):
    """One checkpoint: where it lies, and what was read of it.

    Attributes:
        location: folder or hub id, as messages name it.
        revision: commit of the hub, or `local:` and a digest of the folder's files.
        bytes_read: bytes of weights read so far, headers included.
        total_bytes: bytes of all weight files.
    """

    def __init__(self, location: str, config: dict[str, Any], revision: str) -> None:
        self.location, self.config, self.revision = location, config, revision
        self.bytes_read = 0
        self.total_bytes = 0

    @abstractmethod
    def read(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        """Read the tensors whose names match, and no others.

        Raises:
            FileNotFoundError: a shard is missing.
            OSError: a shard is damaged, or the hub does not answer.
        """


def open_checkpoint(spec: ModelSpec) -> Checkpoint:
    """Open a spec's checkpoint without reading a weight.

    Raises:
        FileNotFoundError: a folder without config or weights.
        ValueError: only pickled weights.
        OSError: the hub cannot be reached and nothing is cached.
    """
    location = Path(locate(spec.repo)).expanduser()
    if location.is_dir():
        return LocalCheckpoint(location / spec.subfolder)
    if spec.repo.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"no such model folder: {spec.repo}")
    return open_hub_checkpoint(spec)


class LocalCheckpoint(Checkpoint):
    """A checkpoint in a folder: one `model.safetensors`, or shards with their index."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json: give the folder of a whole checkpoint")
        files = _weight_files(folder)
        super().__init__(
            str(folder),
            read_json(folder / "config.json"),
            folder_digest(folder, [folder / "config.json", *files]),
        )
        self.folder = folder
        self.total_bytes = sum(path.stat().st_size for path in files if path.is_file())

    def read(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for shard, names in _by_shard(self._shards(), pattern).items():
            path = self.folder / shard
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: copy or download that shard again")
            tensors |= _read_tensors(path, names)
            with path.open("rb") as file:
                self.bytes_read += 8 + int.from_bytes(file.read(8), "little")
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _shards(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            return _weight_map(self.folder / INDEX)
        with _opened(self.folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)


class _Entry(NamedTuple):
    """One tensor of a shard on the hub."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    """Its first byte in the file."""
    end: int

    def decode(self, data: bytes | bytearray) -> torch.Tensor:
        """The tensor of its bytes, through the library's own parser."""
        entry = {"dtype": self.dtype, "shape": self.shape, "data_offsets": [0, len(data)]}
        header = json.dumps({self.name: entry}).encode()
        return load_bytes(len(header).to_bytes(8, "little") + header + data)[self.name]


class HubCheckpoint(Checkpoint):
    """A checkpoint on the hub, read by HTTP ranges; each set of tensors is kept on disk."""

    def __init__(self, repo: str, subfolder: str, config: dict[str, Any], revision: str) -> None:
        super().__init__(repo, config, revision)
        self.subfolder = subfolder
        self._headers: dict[str, dict[str, _Entry]] = {}

    def read(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        from filelock import FileLock

        folder = cache_home() / "towers" / self.location.replace("/", "--") / self.revision
        key = hashlib.sha256(f"{self.subfolder}:{pattern.pattern}".encode()).hexdigest()[:12]
        kept = folder / f"{key}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # a second process waits, then reads the file
            if kept.is_file():
                try:
                    return _read_tensors(kept)
                except OSError as error:
                    logger.warning("%s; fetching those tensors anew", error)
            tensors = self._fetch(pattern)
            try:
                atomic_save(tensors, kept)
            except OSError as error:  # such as a full disk; the fetched tensors are fine
                logger.warning("this tower is not kept for the next time: %s", error)
        return tensors

    def _shards(self) -> dict[str, str]:
        try:
            index = hub_file(self.location, INDEX, self.subfolder, self.revision)
        except FileNotFoundError:  # a checkpoint of one shard has no index
            entries = self._entries(SINGLE)
            self.total_bytes = sum(entry.end - entry.start for entry in entries.values())
            return dict.fromkeys(entries, SINGLE)
        self.total_bytes = int(read_json(index).get("metadata", {}).get("total_size", 0))
        return _weight_map(index)

    def _fetch(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        from tqdm import tqdm

        wanted = _by_shard(self._shards(), pattern)
        spans = [(shard, span) for shard, names in wanted.items() for span in self._spans(shard, names)]
        total = sum(span[-1].end - span[0].start for _, span in spans)
        tensors: dict[str, torch.Tensor] = {}
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"{self.location}: tower only") as progress:
            for shard, span in spans:
                start, body = span[0].start, bytearray()
                for chunk in self._range(shard, start, span[-1].end):
                    body += chunk
                    progress.update(len(chunk))
                for entry in span:
                    tensors[entry.name] = entry.decode(body[entry.start - start : entry.end - start])
        return tensors

    def _spans(self, shard: str, names: list[str]) -> list[list[_Entry]]:
        """Tensors of a shard in groups that one range fetches."""
        entries = self._entries(shard)
        spans: list[list[_Entry]] = []
        for entry in sorted((entries[name] for name in names), key=lambda entry: entry.start):
            if spans and entry.start - spans[-1][-1].end <= MERGE_GAP:
                spans[-1].append(entry)
            else:
                spans.append([entry])
        return spans

    def _entries(self, shard: str) -> dict[str, _Entry]:
        """The tensors of a shard by name, from its header."""
        if shard not in self._headers:
            length = int.from_bytes(b"".join(self._range(shard, 0, 8)), "little")
            body = b"".join(self._range(shard, 8, 8 + length))
            try:
                header = json.loads(body)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise OSError(f"{self.location}: {shard} has no safetensors header: {error}") from error
            header.pop("__metadata__", None)
            self._headers[shard] = {
                name: _Entry(
                    name, entry["dtype"], entry["shape"], *(8 + length + o for o in entry["data_offsets"])
                )
                for name, entry in header.items()
            }
        return self._headers[shard]

    def _range(self, shard: str, start: int, end: int) -> Iterator[bytes]:
        for chunk in hub_range(self.location, shard, self.subfolder, self.revision, start, end):
            self.bytes_read += len(chunk)
            yield chunk


def open_hub_checkpoint(spec: ModelSpec) -> Checkpoint:
    """Open a hub checkpoint; a snapshot that huggingface_hub has in full is read from its folder."""
    from huggingface_hub import try_to_load_from_cache

    config_path = hub_file(spec.repo, "config.json", spec.subfolder, spec.revision)
    inner = (Path(spec.subfolder) / "config.json").parts
    revision = config_path.parents[len(inner) - 1].name  # …/snapshots/<commit>/[subfolder/]config.json
    prefix = f"{spec.subfolder}/" if spec.subfolder else ""
    index = try_to_load_from_cache(spec.repo, f"{prefix}{INDEX}", revision=revision)
    wanted = set(_weight_map(Path(index)).values()) if isinstance(index, str) else {SINGLE}
    if all(
        isinstance(try_to_load_from_cache(spec.repo, prefix + name, revision=revision), str)
        for name in wanted
    ):
        checkpoint = LocalCheckpoint(config_path.parent)
        checkpoint.location, checkpoint.revision = spec.repo, revision
        return checkpoint
    return HubCheckpoint(spec.repo, spec.subfolder, read_json(config_path), revision)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return sorted({folder / shard for shard in _weight_map(folder / INDEX).values()})
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    refuse_pickles(folder)
    raise FileNotFoundError(
        f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a whole checkpoint"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map: copy or download it again")
    return weight_map


def _by_shard(shards: dict[str, str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for name, shard in shards.items():
        if pattern.match(name):
            grouped[shard].append(name)
    return grouped


def _read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Some tensors of a safetensors file, or all of them."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): copy or download that file again") from error
