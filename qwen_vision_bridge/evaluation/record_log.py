"""Records of a run on disk as they come: an append-only JSONL file, and one more for each further process."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io import json_lines, parse_object

logger = logging.getLogger(__name__)

NAME = "results.jsonl"
FILE = re.compile(r"results(\.part-\d+)?\.jsonl")  # `merge` deletes the parts, and nothing of another name


class RecordLog:
    """The records of a folder by key.

    A record is one line, written at once when its image is on disk, so a run that is killed loses nothing
    but the image in the making. Process 0 writes `results.jsonl`, process i `results.part-i.jsonl`;
    `merge` brings them together.

    Args:
        folder: is made when the first record comes.
        process: number of the writing process.

    Raises:
        OSError: a file that cannot be read.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.process = folder, process
        self.records: dict[str, dict[str, Any]] = {}
        for path in self._files():
            _take(self.records, _read(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, which holds its own `key`."""
        name = NAME if self.process == 0 else f"results.part-{self.process}.jsonl"
        _append(self.folder / name, [record])
        self.records[record["key"]] = dict(record)

    def merge(self) -> None:
        """Bring the records of other processes into `results.jsonl` and delete their files.

        Stopped half way it can simply be done again: a record is known by its key.
        """
        known: dict[str, dict[str, Any]] = {}
        for path in self._files():
            fresh = _take(known, _read(path))
            if path.name != NAME:
                _append(self.folder / NAME, fresh)
                path.unlink()
        self.records |= known

    def _files(self) -> list[Path]:
        """The files of records, `results.jsonl` first."""
        return sorted(path for path in self.folder.glob("results*.jsonl") if FILE.fullmatch(path.name))


def _take(known: dict[str, dict[str, Any]], others: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to `known` what is new, or was an error and no longer is; returns what was added."""
    fresh = {
        key: record
        for key, record in others.items()
        if key not in known or (known[key].get("error") and not record.get("error"))
    }
    known |= fresh
    return list(fresh.values())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Records by key; a line cut short by a kill is left out, with a word."""
    records = {}
    for place, line in json_lines(path):
        try:
            record = parse_object(line, place)
            records[record["key"]] = record
        except (ValueError, KeyError):
            logger.warning("%s is cut short: what it was about runs again", place)
    return records


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    with path.open("a+b") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - 1, 0))
        whole = file.read(1) in (b"", b"\n")  # a line cut short is closed before the next begins
        file.write((("" if whole else "\n") + "".join(lines)).encode())
