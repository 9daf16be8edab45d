"""Frozen features of many samples in few files, made once and mapped from disk: what training reads.

A pack is a folder: `<field>.bin` holds a field's rows of all samples one after the other in bf16, and
`samples.jsonl` says for each sample how many rows it has, its grid and its words. Rows are written before
the line that counts them, so a run that was stopped goes on behind the last whole sample. `begun.json` lists
the fields before their files are made; only those files are ever cut or removed. `pack.json`, written last,
says that the pack is finished.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..io import write_json
from ..loading.memory import usable_gpu_bytes
from ..specs import read_json, step_seed
from .data import Sample, Samples

FORMAT = "qwen-vision-bridge/pack/1"
BEGUN = "begun.json"
CHUNK = 64  # samples looked at together
Seen = dict[str, Any]
"""What frozen models make of a sample: tensors (rows, width) by field, and plain data by name."""
See = Callable[[Sequence[Sample]], list[Seen]]


def build_pack(
    folder: str | Path, samples: Samples, see: Callable[[], See], key: str, workers: int = 0
) -> Pack:
    """The pack of some samples: the one in `folder` if it is theirs, else made there now.

    Args:
        see: starts the frozen models; not called where there is nothing left to see.
        key: of everything that decides the features, beside the samples.
        workers: processes that read or render samples; 0 is this one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; what is whole stays.
        FileExistsError: the folder holds a file that is not a pack's where one would go.
        ValueError: its `begun.json` is of another format.
    """
    folder = Path(folder)
    name = {"format": FORMAT, "key": key, "samples": samples.digest, "count": len(samples)}
    begun = _read_begun(folder)
    if begun is None or {item: begun.get(item) for item in name} != name:
        for file in () if begun is None else ("pack.json", "samples.jsonl", *map(_file, begun["fields"])):
            (folder / file).unlink(missing_ok=True)
        begun = {**name, "fields": []}
        write_json(folder / BEGUN, begun)
    if not (folder / "pack.json").is_file():
        _fill(folder, begun, samples, see, workers)
        write_json(folder / "pack.json", {**name, "fields": _fields(folder)})
    return Pack(folder)


class Pack:
    """A finished pack, its rows mapped from disk or put on a device.

    Args:
        device: where batches go. On CUDA the rows themselves go there too if they take less than `share` of
            its free memory.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", share: float = 0.6) -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        about = read_json(self.folder / "pack.json")
        text = (self.folder / "samples.jsonl").read_text(encoding="utf-8")
        self.lines = [json.loads(line) for line in text.splitlines()]
        self.fields: dict[str, Tensor] = {}
        for field, width in about["fields"].items():
            rows = sum(line["rows"][field] for line in self.lines)
            path = str(self.folder / f"{field}.bin")
            flat = torch.from_file(path, shared=False, size=rows * width, dtype=torch.bfloat16)
            self.fields[field] = flat.view(rows, width)
        self._count()
        if self.device.type == "cuda":
            self._to_device(share)

    def __len__(self) -> int:
        return len(self.lines)

    def texts(self) -> list[tuple[str, str | None]]:
        """Prompt and answer of each sample."""
        return [(line["prompt"], line["answer"]) for line in self.lines]

    def rows(self, field: str, samples: Tensor) -> Tensor:
        """A field's rows (B, n, D) of samples (B,) that are laid out alike, on the device."""
        count = int(self._sizes[field][samples[0]])
        place = (self._starts[field][samples, None] + torch.arange(count)).flatten()  # (B·n,)
        values = self.fields[field]
        taken = values.index_select(0, place.to(values.device)).view(len(samples), count, -1)
        return taken.to(self.device, non_blocking=True)

    def draw(self, step: int, count: int, seed: int) -> Tensor:
        """Samples (count,) of one layout, drawn with replacement from (seed, step) alone."""
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
        """The grid of samples that are laid out alike."""
        return tuple(self.lines[int(samples[0])]["grid"])

    def _count(self) -> None:
        """Find out from its lines where each sample's rows are, and which samples are laid out alike."""
        self._starts, self._sizes = {}, {}
        for field in self.fields:
            counts = torch.tensor([line["rows"][field] for line in self.lines])
            self._sizes[field], self._starts[field] = counts, counts.cumsum(0) - counts
        self.layouts = self._by_layout()

    def _by_layout(self) -> dict[str, Tensor]:
        layouts: dict[str, list[int]] = {}
        for index, line in enumerate(self.lines):
            layouts.setdefault(json.dumps([line["grid"], line["rows"]], sort_keys=True), []).append(index)
        return {layout: torch.tensor(members) for layout, members in sorted(layouts.items())}

    def _to_device(self, share: float) -> None:
        free, _ = usable_gpu_bytes(self.device)
        if sum(values.nbytes for values in self.fields.values()) < share * free:
            self.fields = {field: values.to(self.device) for field, values in self.fields.items()}


def join(packs: Sequence[Pack], device: torch.device | str = "cpu") -> Pack:
    """The pack of all samples of several packs with the same fields, one after the other, on a device."""
    whole = copy.copy(packs[0])
    whole.device = torch.device(device)
    whole.lines = [line for pack in packs for line in pack.lines]
    whole.fields = {}
    for field, rows in packs[0].fields.items():
        sizes = [len(pack.fields[field]) for pack in packs]
        joined = torch.empty(sum(sizes), rows.shape[1], dtype=rows.dtype, device=device)
        for part, pack in zip(joined.split(sizes), packs, strict=True):
            part.copy_(pack.fields[field])
        whole.fields[field] = joined
    whole._count()
    return whole


def _file(field: str) -> str:
    return f"{field}.bin"


def _read_begun(folder: Path) -> dict[str, Any] | None:
    """What a pack in a folder was begun as, with its fields; None where there is none."""
    if not os.path.lexists(folder / BEGUN):
        for file in ("pack.json", "samples.jsonl"):
            if os.path.lexists(folder / file):
                raise FileExistsError(
                    f"{folder} holds {file} and no pack: move it away, or give another folder"
                )
        return None
    begun = read_json(folder / BEGUN)
    if begun.get("format") != FORMAT:
        raise ValueError(f"{folder / BEGUN} is not of a pack of this version: give another folder")
    if "fields" not in begun:  # of a version that listed them at the end alone
        begun["fields"] = list(_fields(folder))
    return begun


def _fill(
    folder: Path, begun: dict[str, Any], samples: Samples, see: Callable[[], See], workers: int
) -> None:
    from tqdm import tqdm

    done = _recover(folder, begun["fields"])
    looking = see()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        log = stack.enter_context((folder / "samples.jsonl").open("a", encoding="utf-8"))
        bar = stack.enter_context(tqdm(total=len(samples), initial=done, desc="features", unit="image"))
        for chunk in _chunks(samples, done, workers):
            found = looking(chunk)
            for sample, seen in zip(chunk, found, strict=True):
                rows = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
                for field, values in rows.items():
                    if field not in files:
                        _list_field(folder, begun, field)
                        files[field] = stack.enter_context((folder / _file(field)).open("ab"))
                    plain = values.detach().to("cpu", torch.bfloat16).contiguous()
                    files[field].write(plain.view(torch.uint8).numpy().data)
                seen = {name: value for name, value in seen.items() if name not in rows}
                line = {
                    **seen,
                    "rows": {field: len(values) for field, values in rows.items()},
                    "widths": {field: values.shape[1] for field, values in rows.items()},
                    "prompt": sample.prompt,
                    "answer": sample.answer,
                }
                for file in files.values():
                    file.flush()
                log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update(len(chunk))


def _list_field(folder: Path, begun: dict[str, Any], field: str) -> None:
    """List a field as the pack's, before its file is made."""
    if field in begun["fields"]:
        return
    if os.path.lexists(folder / _file(field)):
        raise FileExistsError(
            f"{folder / _file(field)} is not of this pack: move it away, or give another folder"
        )
    begun["fields"].append(field)
    write_json(folder / BEGUN, begun)


def _recover(folder: Path, fields: Sequence[str]) -> int:
    """Cut off what a stopped run left half done; how many samples are whole."""
    path = folder / "samples.jsonl"
    files = [folder / _file(field) for field in fields if (folder / _file(field)).exists()]
    if not path.is_file():
        for left in files:
            left.unlink()
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    with path.open("r+b") as file:
        file.truncate(len(whole))
    for left in files:
        numbers = (line["rows"].get(left.stem, 0) * line["widths"].get(left.stem, 0) for line in lines)
        with left.open("r+b") as file:
            file.truncate(2 * sum(numbers))
    return len(lines)


def _fields(folder: Path) -> dict[str, int]:
    """Widths by field, as the first whole sample says; empty where there is none yet."""
    path = folder / "samples.jsonl"
    first = path.read_text(encoding="utf-8").partition("\n") if path.is_file() else ("", "", "")
    return json.loads(first[0])["widths"] if first[1] else {}


def _chunks(samples: Samples, first: int, workers: int) -> Iterator[list[Sample]]:
    """The samples from the `first` one on, read by worker processes where there are any."""
    from torch.utils.data import DataLoader, Subset

    rest = Subset(samples, range(first, len(samples)))  # type: ignore[arg-type]
    return iter(DataLoader(rest, CHUNK, collate_fn=list, num_workers=workers))
