"""Features of training samples, computed once by the frozen models and mapped from disk.

A pack is a `FeatureStore` with one shard for every `SHARD_ITEMS` samples, in bf16; a shard's header has the
grid and the texts of each sample.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..features import SHARD_ITEMS, FeatureStore, Item, shard_names
from ..loading.memory import usable_gpu_bytes
from ..specs import step_seed
from .data import Sample, Samples

Fields = dict[str, Any]
"""A sample's features (rows, width) by field, and plain data by name."""
Encode = Callable[[Sequence[Sample]], list[Fields]]


def build_pack(
    folder: str | Path, samples: Samples, load: Callable[[], Encode], key: str, workers: int = 0
) -> Pack:
    """Open the pack of some samples; shards that are missing or damaged are computed first.

    Args:
        load: loads the frozen models and returns their function; not called where nothing is missing.
        key: of everything that decides the features, beside the samples.
        workers: processes that read or render samples; 0 is this one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; finished shards stay.
        FileExistsError: the folder holds a file that is not the pack's where a shard would go.
        ValueError: the folder holds features of other samples, models or settings, or of another version.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    shards = shard_names(len(samples))
    store = FeatureStore(folder, f"{len(samples)} samples ({samples.digest})", {"key": key})
    store.claim(shards)
    if pending := store.pending(dict.fromkeys(shards)):
        store.begin(shards)
        encode = load()
        starts = [SHARD_ITEMS * shards.index(shard) for shard in pending]
        chunks = [range(start, min(start + SHARD_ITEMS, len(samples))) for start in starts]
        loader = DataLoader(samples, batch_sampler=chunks, collate_fn=list, num_workers=workers)
        with tqdm(total=sum(map(len, chunks)), desc="features", unit="image") as progress:
            for shard, chunk in zip(pending, loader, strict=True):
                store.put(shard, None, list(map(_item, chunk, encode(chunk))))
                progress.update(len(chunk))
    store.finish(shards)
    return Pack(folder)


class Pack:
    """The features of training samples, memory-mapped or on a GPU.

    Args:
        device: where batches go. On CUDA all features go there at once if they take less than 60 % of its
            free memory.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._shards = FeatureStore(folder).shards()
        size = sum(rows.nbytes for shard in self._shards for rows in shard.tensors.values())
        keep = self.device.type == "cuda" and size < 0.6 * usable_gpu_bytes(self.device)[0]
        self._index(self.device if keep else torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.lines)

    def texts(self) -> list[tuple[str, str | None]]:
        """Prompt and answer of each sample."""
        return [(line["prompt"], line["answer"]) for line in self.lines]

    def rows(self, field: str, samples: Tensor) -> Tensor:
        """A field's rows (B, n, D) of samples (B,) of one layout, on the device."""
        rows = self.fields[field]
        return torch.stack([rows[index] for index in samples.tolist()]).to(self.device, non_blocking=True)

    def draw(self, step: int, count: int, seed: int) -> Tensor:
        """Draw samples (count,) of one layout, with replacement, from (seed, step) alone."""
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        total = sum(map(len, self.layouts.values()))
        spin = int(torch.randint(total, (), generator=generator))
        for members in self.layouts.values():
            if spin < len(members):
                break
            spin -= len(members)
        return members[torch.randint(len(members), (count,), generator=generator)]

    def partners(self, seed: int) -> Tensor:
        """For each sample another of its layout, (n,), once each; itself where it is the only one."""
        partner = torch.arange(len(self))
        for members in self.layouts.values():
            order = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]
            partner[order] = order.roll(1)
        return partner

    def grid_of(self, samples: Tensor) -> tuple[int, int]:
        """The grid of samples of one layout."""
        return tuple(self.lines[int(samples[0])]["grid"])

    def _index(self, device: torch.device) -> None:
        """List the samples' rows by field, on a device, and their indices by layout."""
        self.lines = [line for shard in self._shards for line in shard.items]
        self.fields: dict[str, list[Tensor]] = {}
        for shard in self._shards:
            for field, rows in shard.tensors.items():
                counts = [line["rows"][field] for line in shard.items]
                self.fields.setdefault(field, []).extend(rows.to(device).split(counts))
        layouts: dict[str, list[int]] = {}
        for index, line in enumerate(self.lines):
            layouts.setdefault(json.dumps([line["grid"], line["rows"]], sort_keys=True), []).append(index)
        self.layouts = {layout: torch.tensor(members) for layout, members in sorted(layouts.items())}


def join(packs: Sequence[Pack], device: torch.device | str = "cpu") -> Pack:
    """The pack of all samples of several packs with the same fields, one after the other, on a device."""
    joined = copy.copy(packs[0])
    joined.device = torch.device(device)
    joined._shards = [shard for pack in packs for shard in pack._shards]
    joined._index(joined.device)
    return joined


def _item(sample: Sample, fields: Fields) -> Item:
    rows = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in fields.items() if name not in rows}
    stored = {name: value.detach().to("cpu", torch.bfloat16) for name, value in rows.items()}
    return Item(stored, {**plain, "prompt": sample.prompt, "answer": sample.answer})
