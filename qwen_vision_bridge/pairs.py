"""Images × prompts → a folder of paired edits with times and differences, which needs no known answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .images import image_digest
from .io import digest_of, write_image, write_json
from .loading.locks import model_lock
from .specs import read_json

FORMAT = "qwen-vision-bridge/pairs/2"

if TYPE_CHECKING:
    from .pipeline import EnhancedQwenImageEdit


def run_pairs(
    pipeline: EnhancedQwenImageEdit,
    pairs: Sequence[tuple[list[Image.Image], str]],
    folder: Path,
    strength: float,
    seed: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Compare every (images, prompt) pair; pairs that the folder holds from the same inputs are kept.

    Writes `results.json` after each pair, and three images a pair: baseline, enhanced, comparison sheet.

    Returns:
        One record a pair, in order.

    Raises:
        ValueError: the folder holds a `results.json` of another kind.
        TypeError: an option that no key can hold, such as a callback.
    """
    from tqdm import tqdm

    path = folder / "results.json"
    known, models, records = _read(path), pipeline.fingerprint(True), []
    for number, (images, prompt) in enumerate(tqdm(pairs, desc="pairs", unit="pair")):
        digests = [image_digest(image) for image in images]
        key = digest_of([models, digests, prompt, strength, seed, sorted(options.items())])
        if key not in known or not all((folder / file).is_file() for file in known[key]["files"].values()):
            stem = f"{number:03d}-{key[:6]}"
            known[key] = {"prompt": prompt, "images": digests}
            known[key] |= _measure(pipeline, folder, stem, images, prompt, strength, seed, options)
            with model_lock:  # another thread may have written since
                known = _read(path) | {key: known[key]}
                provenance = pipeline.provenance([seed])
                write_json(path, {"format": FORMAT, "provenance": provenance, "records": known})
        records.append(known[key])
    return records


def _read(path: Path) -> dict[str, Any]:
    """The records of a folder by key."""
    results = read_json(path) if path.is_file() else {"format": FORMAT, "records": {}}
    if results.get("format") != FORMAT:
        raise ValueError(f"{path} is of another kind or version: give another folder, it is not overwritten")
    return results["records"]


def _measure(
    pipeline: EnhancedQwenImageEdit,
    folder: Path,
    stem: str,
    images: list[Image.Image],
    prompt: str,
    strength: float,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    files = {name: f"{stem}_{name}.png" for name in ("baseline", "enhanced", "comparison")}
    started = time.perf_counter()
    result = pipeline.compare(images, prompt, folder / files["comparison"], strength, seed, **options)
    seconds = time.perf_counter() - started
    write_image(folder / files["baseline"], result.baseline)
    write_image(folder / files["enhanced"], result.enhanced)
    difference = np.abs(np.asarray(result.baseline, float) - np.asarray(result.enhanced, float)).mean()
    weights = result.attention.weights.mean(0).tolist()
    return {
        "files": files,
        "seconds_both": round(seconds, 3),
        "mean_abs_difference": float(difference),
        "level_weights": dict(zip(result.attention.levels, weights, strict=True)),
    }
