"""A folder of paired edits, baseline and enhanced, with times and differences: needs no known answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .edit import Comparison, Edit
from .images import image_digest
from .io import digest_of, write_image, write_json
from .loading.locks import model_lock
from .specs import read_json

FORMAT = "qwen-vision-bridge/pairs/2"


def compare_pairs(
    compare: Callable[[Edit, Path], Comparison],
    edits: Sequence[Edit],
    folder: Path,
    key: Sequence[Any],
    provenance: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run every edit without and with the bridge; results that the folder holds under the same key are kept.

    Writes `results.json` after each pair, and three images a pair: baseline, enhanced, comparison sheet.

    Args:
        compare: runs one comparison and writes its sheet to a path.
        key: everything but images and prompt that decides a comparison.
        provenance: how the results were made, for the file's head.

    Returns:
        One record a pair, in order.

    Raises:
        ValueError: the folder holds a `results.json` of another kind.
        TypeError: a key that holds something without known content, such as a callback.
    """
    from tqdm import tqdm

    path, records = folder / "results.json", []
    known = _read(path)
    for number, edit in enumerate(tqdm(edits, desc="pairs", unit="pair")):
        digests = [image_digest(image) for image in edit.images]
        name = digest_of([key, digests, edit.prompt])
        record = known.get(name)
        if record is None or not all((folder / file).is_file() for file in record["files"].values()):
            measured = _measure(compare, edit, folder, f"{number:03d}-{name[:6]}")
            record = {"prompt": edit.prompt, "images": digests, **measured}
            with model_lock:  # another thread may have written since
                known = _read(path) | {name: record}
                write_json(path, {"format": FORMAT, "provenance": provenance, "records": known})
        records.append(record)
    return records


def _read(path: Path) -> dict[str, Any]:
    """The records of a folder by key."""
    results: dict[str, Any] = read_json(path) if path.is_file() else {"format": FORMAT, "records": {}}
    if results.get("format") != FORMAT:
        raise ValueError(f"{path} is of another kind or version: give another folder, it is not overwritten")
    return results["records"]


def _measure(
    compare: Callable[[Edit, Path], Comparison], edit: Edit, folder: Path, stem: str
) -> dict[str, Any]:
    files = {name: f"{stem}_{name}.png" for name in ("baseline", "enhanced", "comparison")}
    started = time.perf_counter()
    baseline, enhanced, attention = compare(edit, folder / files["comparison"])
    seconds = time.perf_counter() - started
    write_image(folder / files["baseline"], baseline)
    write_image(folder / files["enhanced"], enhanced)
    difference = np.abs(np.asarray(baseline, float) - np.asarray(enhanced, float))
    weights = attention.weights.mean(0).tolist()
    return {
        "files": files,
        "seconds_both": round(seconds, 3),
        "mean_abs_difference": float(difference.mean()),
        "level_weights": dict(zip(attention.levels, weights, strict=True)),
    }
