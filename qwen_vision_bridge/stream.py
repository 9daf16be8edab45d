"""Features of a whole folder of images: read ahead, batched by grid, written in shards, resumable.

A shard is a fixed stretch of the sorted images, so its content depends neither on how many processes share
the work nor on where an earlier run stopped. Two shards and the images read ahead are all that is in memory.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from PIL import Image

from .cache import VisionCache
from .distributed import Processes
from .extractor import Grid, Role, VisionCacheExtractor
from .features import SHARD_ITEMS, FeatureStore, Item, folder_store, shard_names
from .images import load_images
from .io import list_images
from .loading.memory import GpuMemoryError, free_cuda, is_out_of_memory
from .specs import LEVEL_NAMES

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

BATCH_TOKENS = 32 * 256  # merged tokens a batch: 32 images of 512²
READ_AHEAD = 64  # images
FIELDS = {"qwen3": LEVEL_NAMES, "qwen25": ("vision",)}
Stamps = dict[str, list[int]]
"""Image → its size in bytes and modification time; a changed image is extracted again."""
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class FolderResult(NamedTuple):
    """What a run over a folder did."""

    folder: Path
    images: int
    """Images with features in the folder."""
    done: int
    """Those of this run, all processes together."""
    skipped: dict[str, str]
    """Files that were left out, and why."""
    seconds: float
    """From both towers being ready to the last shard on disk."""

    @property
    def images_per_second(self) -> float:
        """Of this run, all processes together."""
        return self.done / self.seconds if self.done else 0.0


class FeatureFolder:
    """The features that `extract_folder` wrote, image by image.

    Raises:
        FileNotFoundError: the folder has no complete index: the run did not end.
        ValueError: its index is of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self._shards = FeatureStore(folder).shards()
        self._places = {
            item["name"]: (shard, number) for shard in self._shards for number, item in enumerate(shard.items)
        }

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """The images, as paths below the folder that they came from."""
        return list(self._places)

    def __getitem__(self, name: str) -> VisionCache:
        """One image's features, on the CPU."""
        shard, number = self._places[name]
        features = {field: shard.split(field)[number][None] for field in shard.tensors}
        return VisionCache(features, (tuple(shard.items[number]["grid"]),), shard.header["fingerprint"])


def extract_folder(
    extractor: VisionCacheExtractor,
    images: str | Path,
    output: str | Path,
    role: Role = "qwen3",
    shard_images: int = SHARD_ITEMS,
    batch_tokens: int = BATCH_TOKENS,
    workers: int | None = None,
) -> FolderResult | None:
    """Extract features of every image below a folder into safetensors shards with an `index.json`.

    Shards that fit are kept, and a file that the output's own index does not list is never touched. Under
    `accelerate launch` the processes share the shards; what they write is what one process writes.

    Args:
        role: `qwen3` for the source's levels, `qwen25` for the target's features.
        shard_images: images a shard.
        batch_tokens: merged tokens that go through the tower at once; halved when the GPU runs out of memory.
        workers: threads that read images; None is one a core, at most 16.

    Returns:
        None in processes other than the first.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError, FileExistsError: the output is of another folder, of other models or settings, or holds
            somebody else's file where a shard would go.
    """
    images, processes = Path(images), Processes()
    plan, left_out = _plan(images, shard_images)
    store = folder_store(images, output, folder_provenance(extractor, role))
    store.claim(plan)
    pending = store.pending(plan)
    extractor.warm(role)
    extractor.target_grid(Image.new("RGB", (64, 64)))  # reads its limits, before many threads ask for them
    processes.wait()  # all have looked before anyone writes, and all towers are there
    if processes.is_main and pending:
        store.begin(plan)
    processes.wait()  # no shard is written before the index lists it
    started = time.perf_counter()
    mine = {shard: plan[shard] for shard in processes.share(list(plan)) if shard in pending}
    work = _Extraction(extractor, role, images, store, batch_tokens)
    with processes.working_in(store.folder) if pending else nullcontext():
        work.run(mine, workers or min(16, os.cpu_count() or 1), processes.is_main)
        processes.wait()
    if not processes.is_main:
        return None
    headers = store.headers(plan)
    skipped = left_out | {
        name: reason for header in headers.values() for name, reason in header["skipped"].items()
    }
    store.finish(plan, skipped=skipped)
    count = {shard: len(header["items"]) for shard, header in headers.items()}
    done = sum(count[shard] for shard in pending)
    return FolderResult(store.folder, sum(count.values()), done, skipped, time.perf_counter() - started)


class _Image(NamedTuple):
    """An image that is ready for its tower, or why it is not."""

    name: str
    pixels: Image.Image | None
    grid: Grid
    reason: str = ""


class _Extraction:
    """One process's shards."""

    def __init__(
        self,
        extractor: VisionCacheExtractor,
        role: Role,
        images: Path,
        store: FeatureStore,
        batch_tokens: int,
    ) -> None:
        self.extractor, self.role, self.images = extractor, role, images
        self.store, self.batch_tokens = store, batch_tokens

    def run(self, plan: dict[str, Stamps], workers: int, show: bool) -> None:
        """Extract every shard, reading ahead of the tower and writing behind it."""
        from tqdm import tqdm

        names = [name for members in plan.values() for name in members]
        with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
            images = read_ahead(readers, self._read, names, READ_AHEAD)
            writing: Future[None] | None = None
            with tqdm(total=len(names), unit="image", disable=not show) as progress:
                for shard, members in plan.items():
                    items, skipped = self._shard(islice(images, len(members)), progress)
                    if writing is not None:
                        writing.result()  # at most one shard waits for the disk
                    writing = writer.submit(self.store.put, shard, members, items, skipped=skipped)
            if writing is not None:
                writing.result()

    def _read(self, name: str) -> _Image:
        """Open an image and resize it for the source's tower."""
        family = self.extractor.family
        try:
            image = load_images(self.images / name, family.target.token_px)[0]
        except (OSError, ValueError) as error:
            return _Image(name, None, (0, 0), str(error))
        grid = self.extractor.target_grid(image)
        if self.role == "qwen3":
            px = family.source.token_px
            image = image.resize((grid[1] * px, grid[0] * px), Image.Resampling.BICUBIC)
        return _Image(name, image, grid)

    def _shard(self, images: Iterable[_Image], progress: tqdm) -> tuple[list[Item], dict[str, str]]:
        """Items of one shard in the order of its images, and what was skipped; equal grids share batches."""
        waiting: dict[Grid, list[_Image]] = {}
        items: dict[str, Item | None] = {}
        skipped: dict[str, str] = {}
        for image in images:
            if image.pixels is None:
                skipped[image.name] = image.reason
                progress.update(1)
                continue
            items[image.name] = None  # keeps its place
            batch = waiting.setdefault(image.grid, [])
            batch.append(image)
            if len(batch) * image.grid[0] * image.grid[1] >= self.batch_tokens:
                items |= self._batch(waiting.pop(image.grid), progress)
        for batch in waiting.values():
            items |= self._batch(batch, progress)
        return [item for item in items.values() if item is not None], skipped

    def _batch(self, batch: Sequence[_Image], progress: tqdm) -> dict[str, Item]:
        """Features of one batch on the CPU; a batch too large for the GPU is halved, and so are the next."""
        caches = None
        try:
            caches = self.extractor.extract_batch(
                self.role,
                [image.pixels for image in batch if image.pixels is not None],
                [image.grid for image in batch],
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if caches is None:  # outside the `except`: the error's frames would keep the tensors alive
            free_cuda()
            if len(batch) == 1:
                raise GpuMemoryError(
                    f"the GPU ran out of memory over {batch[0].name} alone: close other programs on it, or "
                    "make the image smaller"
                )
            half = len(batch) // 2
            self.batch_tokens = max(1, self.batch_tokens // 2)
            logger.warning("batches of %d images are too large for the GPU: halved", len(batch))
            return self._batch(batch[:half], progress) | self._batch(batch[half:], progress)
        progress.update(len(batch))
        return {
            image.name: Item(
                {field: cache.features[field][0].cpu() for field in FIELDS[self.role]},
                {"name": image.name, "grid": list(image.grid)},
            )
            for image, cache in zip(batch, caches, strict=True)
        }


def read_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Argument], Result], items: Iterable[Argument], depth: int
) -> Iterator[Result]:
    """Yield results in the order of the items, with at most `depth` of them begun and not yet taken."""
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


def _plan(images: Path, size: int) -> tuple[dict[str, Stamps], dict[str, str]]:
    """Shard file → its images with their stamps, `size` images a shard; and files that are no images."""
    listed = list_images(images)
    stamps = [(name, _stamp(images / name)) for name in listed.names]
    starts = range(0, len(stamps), size)
    shards = shard_names(len(stamps), size)
    plan = {shard: dict(stamps[start : start + size]) for shard, start in zip(shards, starts, strict=True)}
    return plan, listed.left_out


def _stamp(path: Path) -> list[int]:
    """A file's size in bytes and modification time, zeros if it has vanished: reading it tells."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]
