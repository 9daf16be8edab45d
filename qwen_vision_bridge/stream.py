"""Features of a whole folder of images: read ahead, batched, written in shards, going on where it stopped.

A shard is a fixed stretch of the sorted images. What is in it does not depend on how many processes share
the work or where an earlier run stopped. Two shards and the images read ahead are all that is in memory.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from .cache import VisionCache
from .distributed import Processes
from .extractor import Grid, VisionCacheExtractor
from .feature_index import FORMAT, SHARD_IMAGES, check_output, list_shards, read_index, write_index
from .images import load_images
from .loading.checkpoints import atomic_save
from .loading.memory import GpuMemoryError, free_cuda, is_out_of_memory
from .specs import LEVEL_NAMES

logger = logging.getLogger(__name__)

BATCH_TOKENS = 32 * 256  # merged tokens a batch: 32 images of 512²
READ_AHEAD = 64  # images
NAMES = {"qwen3": LEVEL_NAMES, "qwen25": ("vision",)}
Role = Literal["qwen3", "qwen25"]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Streamed(NamedTuple):
    """What a run over a folder did."""

    folder: Path
    images: int
    """Images with features in the folder."""
    done: int
    """Those of this run, all processes together."""
    skipped: dict[str, str]
    """Files that could not be read, and why."""
    seconds: float
    """From the towers being ready to the last shard on disk."""

    @property
    def images_per_second(self) -> float:
        """Of this run, all processes together."""
        return self.done / self.seconds if self.done else 0.0


class _Read(NamedTuple):
    """An image that is ready for its tower, or why it is not."""

    name: str
    image: Image.Image | None
    grid: Grid | None
    reason: str = ""


class FeatureFolder:
    """The features that `extract_folder` wrote, image by image.

    Raises:
        FileNotFoundError: the folder has no complete index: the run did not end.
        ValueError: its index is of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None or not index["complete"]:
            raise FileNotFoundError(f"{self.folder} has no complete index: run the extraction to its end")
        self.index = index

    def __len__(self) -> int:
        return len(self.index["images"])

    @property
    def names(self) -> list[str]:
        """The images, as paths below the folder that they came from."""
        return list(self.index["images"])

    def __getitem__(self, name: str) -> VisionCache:
        """One image's features, on the CPU."""
        entry = self.index["images"][name]
        with safe_open(self.folder / entry["shard"], framework="pt") as shard:
            features = {key: shard.get_tensor(f"{name}:{key}")[None] for key in self.index["features"]}
        return VisionCache(features, (tuple(entry["grid"]),), self.index["fingerprint"])


def extract_folder(
    extractor: VisionCacheExtractor,
    images: str | Path,
    output: str | Path,
    role: Role = "qwen3",
    shard_images: int = SHARD_IMAGES,
    batch_tokens: int = BATCH_TOKENS,
    workers: int | None = None,
) -> Streamed | None:
    """Features of every image below a folder, in safetensors shards with an `index.json`.

    Shards that are there and fit are not made again; a file that the output's own index does not list is
    never touched. Under `accelerate launch` the shards are dealt out to the processes; what they write is
    what one process writes.

    Args:
        role: `qwen3` for the source's levels, `qwen25` for the target's features.
        shard_images: images a shard.
        batch_tokens: merged tokens that go through the tower at once; halved where memory does not do.
        workers: threads that read images; None is one a core, at most 16.

    Returns:
        None in processes other than the first.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError, FileExistsError: the output is of another folder, of other models or settings, or holds
            somebody else's file where a shard would go.
    """
    images, output, processes = Path(images), Path(output), Processes()
    shards = list_shards(images, shard_images)
    fingerprint = folder_provenance(extractor, role)
    owned = check_output(output, images, shards, fingerprint)
    output.mkdir(parents=True, exist_ok=True)
    pending = [
        name for name, names in shards.items() if not _is_done(output / name, images, names, fingerprint)
    ]
    extractor.warm(role)
    extractor.target_grid(Image.new("RGB", (64, 64)))  # its processor too, before many threads ask for it
    processes.wait()  # all have looked before anyone writes, and all towers are there
    stale = set(owned) - set(shards)
    if processes.is_main and (pending or stale):
        write_index(output, images, {*owned, *shards}, fingerprint, NAMES[role])
    processes.wait()  # no shard is written before the index lists it
    started = time.perf_counter()
    mine = {name: shards[name] for name in processes.share(list(shards)) if name in pending}
    work = _Work(extractor, role, images, output, fingerprint, batch_tokens)
    work.run(mine, workers or min(16, os.cpu_count() or 1), processes.is_main)
    processes.wait()
    if not processes.is_main:
        return None
    for name in stale:
        (output / name).unlink(missing_ok=True)
    found, skipped, done = _read_back(output, shards, pending)
    write_index(output, images, shards, fingerprint, NAMES[role], found, skipped)
    return Streamed(output, len(found), done, skipped, time.perf_counter() - started)


class _Work:
    """One process's shards."""

    def __init__(
        self,
        extractor: VisionCacheExtractor,
        role: Role,
        images: Path,
        output: Path,
        fingerprint: dict[str, str],
        batch_tokens: int,
    ) -> None:
        self.extractor, self.role, self.images, self.output = extractor, role, images, output
        self.fingerprint, self.batch_tokens = fingerprint, batch_tokens

    def run(self, shards: dict[str, list[str]], workers: int, show: bool) -> None:
        """Make every shard, reading ahead of the tower and writing behind it."""
        from tqdm import tqdm

        names = [name for members in shards.values() for name in members]
        with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
            prepared = read_ahead(readers, self._read, names, READ_AHEAD)
            writing: Future[Any] | None = None
            with tqdm(total=len(names), unit="image", disable=not show) as progress:
                for file, members in shards.items():
                    tensors, header = self._shard(members, prepared, progress)
                    if writing is not None:
                        writing.result()  # no more than one shard waits for the disk
                    writing = writer.submit(atomic_save, tensors, self.output / file, header)
            if writing is not None:
                writing.result()

    def _read(self, name: str) -> _Read:
        """Open an image and bring it to the size that the source's tower wants."""
        family = self.extractor.family
        try:
            image = load_images(self.images / name, family.target.token_px)[0]
        except (OSError, ValueError) as error:
            return _Read(name, None, None, str(error))
        grid = self.extractor.target_grid(image)
        if self.role == "qwen3":
            px = family.source.token_px
            image = image.resize((grid[1] * px, grid[0] * px), Image.Resampling.BICUBIC)
        return _Read(name, image, grid)

    def _shard(
        self, members: list[str], prepared: Iterator[_Read], progress: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and header of one shard; images of one grid share batches."""
        waiting: dict[Grid, list[_Read]] = {}
        tensors: dict[str, torch.Tensor] = {}
        skipped: dict[str, str] = {}
        grids: dict[str, Grid] = {}

        def flush(grid: Grid) -> None:
            batch = waiting.pop(grid)
            tensors.update(self._batch(batch))
            progress.update(len(batch))

        for read in (next(prepared) for _ in members):
            if read.image is None or read.grid is None:
                skipped[read.name] = read.reason
                progress.update(1)
                continue
            grids[read.name] = read.grid
            waiting.setdefault(read.grid, []).append(read)
            if len(waiting[read.grid]) * read.grid[0] * read.grid[1] >= self.batch_tokens:
                flush(read.grid)
        for grid in list(waiting):
            flush(grid)
        header = {
            "fingerprint": self.fingerprint,
            "grids": grids,
            "files": _stamps(self.images, members),
            "skipped": skipped,
        }
        # One entry: safetensors writes several in any order, and a shard's bytes shall not depend on chance.
        return tensors, {FORMAT: json.dumps(header)}

    def _batch(self, batch: Sequence[_Read]) -> dict[str, torch.Tensor]:
        """Features of one batch on the CPU; a batch too large for the GPU is halved, and so are the next."""
        failed = False
        try:
            made = self.extractor.extract_batch(
                self.role, [read.image for read in batch], [read.grid for read in batch]
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        if failed:  # outside the `except`, so that the error's frames hold nothing any more
            free_cuda()
            if len(batch) == 1:
                raise GpuMemoryError(
                    f"the GPU ran out of memory over {batch[0].name} alone: close other programs on it, or "
                    "make the image smaller"
                )
            half = len(batch) // 2
            self.batch_tokens = max(1, self.batch_tokens // 2)
            logger.warning("batches of %d images are too large for the GPU: halved", len(batch))
            return {**self._batch(batch[:half]), **self._batch(batch[half:])}
        return {
            f"{read.name}:{key}": cache.features[key][0].cpu()
            for read, cache in zip(batch, made, strict=True)
            for key in NAMES[self.role]
        }


def read_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Results in the order of the items, with at most `depth` of them begun and not yet taken."""
    begun: deque[Future[Result]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= depth:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def folder_provenance(extractor: VisionCacheExtractor, role: Role) -> dict[str, str]:
    """Everything beside the images that decides the features of a folder."""
    target = extractor.family.target  # its processor decides the grid of the source's features too
    return {
        **extractor.provenance(role),
        "target_grid": target.name,
        "target_repo": target.repo,
        "target_revision": str(target.revision),
    }


def _header(path: Path) -> dict[str, Any]:
    """A shard's header; empty where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get(FORMAT, "{}"))
    except (SafetensorError, FileNotFoundError):
        return {}


def _stamps(images: Path, names: Sequence[str]) -> dict[str, list[int]]:
    stats = {name: (images / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _is_done(shard: Path, images: Path, names: Sequence[str], fingerprint: dict[str, str]) -> bool:
    """Whether a shard is there in full, made of these very files in this very way."""
    header = _header(shard)
    return header.get("files") == _stamps(images, names) and header.get("fingerprint") == fingerprint


def _read_back(
    output: Path, shards: dict[str, list[str]], pending: list[str]
) -> tuple[dict[str, Any], dict[str, str], int]:
    """Image → its shard and grid; the files left out, and why; images of the pending shards."""
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    done = 0
    for shard, names in shards.items():
        header = _header(output / shard)
        grids = header["grids"]
        found |= {name: {"shard": shard, "grid": grids[name]} for name in names if name in grids}
        skipped |= header["skipped"]
        done += len(grids) if shard in pending else 0
    return found, skipped, done
