"""The tensors of a safetensors checkpoint by name, from a folder or, by byte ranges, from the hub.

Format: 8 bytes little-endian header length, a JSON header of dtypes, shapes and offsets, then the data
(huggingface/safetensors, README). A tensor can therefore be fetched without the rest of its shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file

from ..io import write_whole
from ..specs import BUILTIN, ModelSpec, cache_home, read_json
from .hub import hub_file, hub_range, hub_size

logger = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MERGE_GAP = 64 * 1024  # bytes worth fetching to save a request
FULL_HASH_LIMIT = 64 * 2**20  # folders up to this size are identified by all their bytes


SHIPPED = Path(__file__).parents[1] / "weights" / "miniature"


def locate(repo: str) -> str:
    """Turn a `builtin:` location into the package's folder of shipped weights; others pass unchanged.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    if not repo.startswith(BUILTIN):
        return repo
    folder = SHIPPED / ("source" if repo == f"{BUILTIN}source" else "editor")
    if not folder.is_dir():
        raise FileNotFoundError(f"no weights of the miniature in {folder}: install the whole package")
    return str(folder)


class Checkpoint(ABC):
    """Where one checkpoint's tensors lie and what was read of them.

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
        FileNotFoundError: a folder without config or safetensors weights.
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
        return dict.fromkeys(_tensor_names(self.folder / SINGLE), SINGLE)


class HubCheckpoint(Checkpoint):
    """A checkpoint on the hub, read by HTTP ranges and kept on disk by the set of tensors asked for."""

    def __init__(self, repo: str, subfolder: str, config: dict[str, Any], revision: str) -> None:
        super().__init__(repo, config, revision)
        self.subfolder = subfolder
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def read(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        from filelock import FileLock

        folder = cache_home() / "towers" / self.location.replace("/", "--") / self.revision
        kept = (
            folder
            / f"{hashlib.sha256(f'{self.subfolder}:{pattern.pattern}'.encode()).hexdigest()[:12]}.safetensors"
        )
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # a second process waits, and then finds the file
            if kept.is_file():
                try:
                    return _read_tensors(kept, _tensor_names(kept))
                except OSError as error:
                    logger.warning("%s; fetching those tensors anew", error)
            tensors = self._fetch(pattern)
            try:
                atomic_save(tensors, kept)
            except OSError as error:  # a full disk, say: what was fetched is fine
                logger.warning("this tower is not kept for the next time: %s", error)
        return tensors

    def _shards(self) -> dict[str, str]:
        try:
            index = hub_file(self.location, INDEX, self.subfolder, self.revision)
        except FileNotFoundError:  # a checkpoint of one shard has no index
            self.total_bytes = hub_size(self.location, SINGLE, self.subfolder, self.revision)
            return {name: SINGLE for name in self._header(SINGLE)[1] if name != "__metadata__"}
        self.total_bytes = int(read_json(index).get("metadata", {}).get("total_size", 0))
        return _weight_map(index)

    def _fetch(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        from tqdm import tqdm

        wanted = _by_shard(self._shards(), pattern)
        plan = [(shard, *span) for shard, members in wanted.items() for span in self._spans(shard, members)]
        tensors: dict[str, torch.Tensor] = {}
        with tqdm(
            total=sum(end - start for _, start, end, _ in plan),
            unit="B",
            unit_scale=True,
            desc=f"{self.location}: tower only",
        ) as progress:
            for shard, start, end, members in plan:
                body = bytearray()
                for chunk in self._range(shard, start, end):
                    body += chunk
                    progress.update(len(chunk))
                tensors |= self._decode(shard, start, body, members)
        return tensors

    def _decode(self, shard: str, start: int, body: bytearray, members: list[str]) -> dict[str, torch.Tensor]:
        """Cut a fetched span into its tensors, through the library's own parser."""
        first, header = self._header(shard)
        tensors = {}
        for name in members:
            begin, end = (offset + first - start for offset in header[name]["data_offsets"])
            entry = json.dumps({name: {**header[name], "data_offsets": [0, end - begin]}}).encode()
            tensors |= load_bytes(len(entry).to_bytes(8, "little") + entry + bytes(body[begin:end]))
        return tensors

    def _spans(self, shard: str, members: list[str]) -> list[tuple[int, int, list[str]]]:
        """Byte spans (start, end, tensor names) of a shard, neighbours merged."""
        first, header = self._header(shard)
        spans: list[tuple[int, int, list[str]]] = []
        for name in sorted(members, key=lambda member: header[member]["data_offsets"][0]):
            start, end = (offset + first for offset in header[name]["data_offsets"])
            if spans and start - spans[-1][1] <= MERGE_GAP:
                spans[-1] = (spans[-1][0], end, [*spans[-1][2], name])
            else:
                spans.append((start, end, [name]))
        return spans

    def _header(self, shard: str) -> tuple[int, dict[str, Any]]:
        """Offset of a shard's first data byte, and its header."""
        if shard not in self._headers:
            length = int.from_bytes(b"".join(self._range(shard, 0, 8)), "little")
            body = b"".join(self._range(shard, 8, 8 + length))
            try:
                self._headers[shard] = (8 + length, json.loads(body))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise OSError(f"{self.location}: {shard} has no safetensors header: {error}") from error
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


def check_tensors(location: str | Path, found: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are not exactly those of its checkpoint: what is missing is random.

    Args:
        location: of the checkpoint, or the part of an editor, for the message.
        found: `missing_keys`, `unexpected_keys`, `mismatched_keys` (names, or tuples that begin with one) and
            `error_msgs`, as transformers and diffusers give them with `output_loading_info=True`: without
            tied weights and what a class allows to be absent.

    Raises:
        ValueError: how many are wrong, and the first of them.
    """
    faults = []
    for kind, told in (
        ("missing", "missing"),
        ("unexpected", "unexpected"),
        ("mismatched", "of another shape"),
    ):
        keys = found.get(f"{kind}_keys") or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if names:
            faults.append(f"{len(names)} {told} (first: {names[0]})")
    faults += [" ".join(str(message).split()) for message in found.get("error_msgs") or ()]
    if faults:
        raise ValueError(
            f"{location}: its tensors do not fit its config: {', '.join(faults)}: copy or download it again"
        )


@contextmanager
def without_loading_reports() -> Iterator[None]:
    """Leave out the libraries' tables of missing tensors, which `check_tensors` tells in one line."""
    loggers = [logging.getLogger(f"{name}.modeling_utils") for name in ("transformers", "diffusers.models")]
    try:
        for each in loggers:  # no level is set: transformers does more at a higher one
            each.addFilter(_drop)
        yield
    finally:
        for each in loggers:
            each.removeFilter(_drop)


def _drop(_record: logging.LogRecord) -> bool:
    return False


def broken_weight(models: Mapping[str, Any]) -> str | None:
    """The first weight with NaN or infinity, as `model.weight`; None where all that lie here are finite.

    It reads every weight, so it is asked only once an output is not finite.
    """
    for role, model in models.items():
        for name, weight in model.named_parameters():
            readable = weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
            if readable and not torch.isfinite(weight).all():
                return f"{role}.{name}"
    return None


def not_finite(what: str, models: Mapping[str, Any]) -> ValueError:
    """The error of an output with NaN or infinity, which names its cause.

    Outputs are looked at and not all weights, since they are small, and nothing that matters escapes them.
    """
    if broken := broken_weight(models):
        cause = f"so does the weight {broken}; copy or download that checkpoint again"
    else:
        cause = "the weights are finite, so the model overflows in its dtype; use bfloat16 or float32"
    return ValueError(f"{what} hold NaN or infinity: {cause}")


def atomic_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside its place and rename it in, so that no reader meets half a file.

    Raises:
        OSError: it cannot be written, for want of room for example; nothing is left behind.
    """
    whole = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    try:
        write_whole(path, lambda file: save_file(whole, file, metadata))
    except SafetensorError as error:  # how the library reports a failed write
        raise OSError(f"{path} could not be written ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return sorted({folder / shard for shard in _weight_map(folder / INDEX).values()})
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise FileNotFoundError(
            f"{folder} has only pickled weights ({pickled[0]}), which are never loaded: "
            "convert them to safetensors"
        )
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


def _read_tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): copy or download that file again") from error


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): copy or download that file again") from error


def folder_digest(folder: Path, files: list[Path]) -> str:
    """Identify a folder's files: by all bytes where they are few, else by sizes and times of change."""
    digest = hashlib.sha256()
    present = sorted(path for path in files if path.is_file())
    small = sum(path.stat().st_size for path in present) <= FULL_HASH_LIMIT
    for path in present:
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}:{stat.st_size}".encode())
        digest.update(path.read_bytes() if small else str(stat.st_mtime_ns).encode())
    return f"local:{digest.hexdigest()[:16]}"
