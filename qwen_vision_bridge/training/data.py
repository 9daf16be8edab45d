"""What a bridge learns from: questions about images with their answers, and edits with their results.

From the synthetic world, from a folder of the user's own, or from a Hugging Face dataset. Everything that can
be wrong with a user's data is found before a model is loaded, each fault with its file and line.

A folder holds `metadata.jsonl`, one object a line: `image` (or `file_name`, as in the `imagefolder`
convention) with `question` and `answer`, or with `instruction` and `target`, an image of the same size.
Paths are relative to the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from PIL import Image

from ..case import Scene
from ..images import load_images
from ..io import digest_of
from ..synthetic import cases as world
from ..synthetic import questions
from ..synthetic.scene import render

Kind = Literal["perceive", "edit"]
METADATA = "metadata.jsonl"
COLUMNS: dict[str, tuple[str, str]] = {"perceive": ("question", "answer"), "edit": ("instruction", "target")}
SHOWN_FAULTS = 20
# How often a taught model is asked what an instruction means, and what else a question is about.
INSTRUCTED = 0.3
ASKED = {"read": 0.45, "locate": 0.2, "count": 0.05, "describe": 0.3}
EXPLAINABLE = ("read", "locate", "count")  # what a model that was not taught the world can be asked
ONE_IMAGE = tuple((group, kind) for group in ("ocr", "space", "detail") for kind in world.KINDS[group])


class Sample(NamedTuple):
    """One image with something to say or to make of it."""

    image: Image.Image
    prompt: str
    answer: str | None = None
    """What the language model should reply; None for an edit."""
    after: Image.Image | None = None
    """What the edit should give, as large as `image`; None for a question."""


class Samples(Protocol):
    """A list of samples that are made or read one at a time, in any process."""

    digest: str
    """Changes whenever a sample does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleFileError(ValueError):
    """Faults in a user's data, a line each with file and line number."""


class WorldSamples:
    """Sample i of a split of `world.py`, the same on every machine.

    Args:
        taught: whether the model that is asked was trained on the world and knows its forms of reply; others
            are asked to read, locate and count alone, with the form explained.
        size: px of an image's side.
    """

    def __init__(
        self, kind: Kind, split: str, count: int, taught: bool = True, size: int = 128, first: int = 0
    ) -> None:
        if kind not in get_args(Kind) or split not in world.SPLITS:
            raise ValueError(f"samples are of a kind and a split of the world, not {kind!r}, {split!r}")
        self.kind, self.split, self.count, self.taught = kind, split, count, taught
        self.size, self.first = size, first
        self.digest = digest_of(["world", kind, split, first, count, taught, size, ASKED, INSTRUCTED])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        purpose = 2000 + get_args(Kind).index(self.kind)
        stream = [world.SPLITS.index(self.split), purpose, self.first + index]
        rng = np.random.default_rng(stream)
        group, kind = ONE_IMAGE[int(rng.integers(len(ONE_IMAGE)))]
        edit = world.make_edit(group, kind, rng, self.size, self.split == "novel")
        if self.kind == "edit":
            return Sample(render(edit.before), edit.prompt, after=render(edit.after))
        if self.taught and rng.random() < INSTRUCTED:
            return Sample(render(edit.before), edit.prompt, edit.answer)
        scene = edit.after if rng.random() < 0.4 else edit.before
        return Sample(render(scene), *_question(scene, rng, self.taught))


class FolderSamples:
    """The samples of one kind in a user's folder, checked whole.

    Raises:
        FileNotFoundError: no such folder, or no `metadata.jsonl` in it.
        SampleFileError: every fault in it.
    """

    def __init__(self, folder: str | Path, kind: Kind) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"no such folder of training data: {root}")
        if not (root / METADATA).is_file():
            raise FileNotFoundError(
                f"{root} has no {METADATA}: one line a sample, with image, question, answer or with image, "
                "instruction, target"
            )
        self.kind, self.root = kind, root
        self.rows = _checked_rows(root, kind)
        stamps = [
            [row, [(root / row[name]).stat().st_size for name in ("image", "target") if name in row]]
            for row in self.rows
        ]
        self.digest = digest_of(["folder", kind, stamps])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        (image,) = load_images(self.root / row["image"], 1)
        if self.kind == "perceive":
            return Sample(image, row["question"], row["answer"])
        (after,) = load_images(self.root / row["target"], 1)
        return Sample(image, row["instruction"], after=after)


class DatasetSamples:
    """The samples of one kind in a Hugging Face dataset with the folder's columns; images are `Image`s.

    Raises:
        ValueError: the `datasets` package is not there, or a column is missing.
    """

    def __init__(self, name: str, kind: Kind, split: str = "train") -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "--dataset_name needs the package `datasets`, which is not installed: `uv run --with "
                "datasets python train_bridge.py …`, or give a folder with --train_data_dir"
            ) from error
        self.kind, self.data = kind, datasets.load_dataset(name, split=split)
        wanted = {"image", *COLUMNS[kind]}
        if missing := sorted(wanted - set(self.data.column_names)):
            raise ValueError(
                f"the dataset {name} has no column {missing[0]!r}, only {', '.join(self.data.column_names)}; "
                f"for --method {kind} it needs {', '.join(sorted(wanted))}"
            )
        self.digest = digest_of(["dataset", name, split, kind, self.data._fingerprint])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        row = self.data[index]
        (image,) = load_images(row["image"])
        if self.kind == "perceive":
            return Sample(image, row["question"], row["answer"])
        (after,) = load_images(row["target"])
        if image.size != after.size:
            raise SampleFileError(
                f"row {index}: the target is {after.size} px, the image {image.size}: make them equal"
            )
        return Sample(image, row["instruction"], after=after)


class Part:
    """Some of the samples of a list, by index."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, list(indices)

    @property
    def digest(self) -> str:
        """Of the whole list and the indices."""
        return digest_of([self.samples.digest, self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]


def held_out(samples: Samples, most: int, share: float = 0.1) -> tuple[Part, Part]:
    """Samples to learn from, and others, evenly spread, to validate on: at most `most` and `share` of all.

    Raises:
        ValueError: a single sample, which cannot be split.
    """
    if len(samples) < 2:
        raise ValueError(
            f"training needs at least two samples, one of them to validate on; got {len(samples)}"
        )
    count = max(1, min(most, int(share * len(samples))))
    aside = {round(number * (len(samples) - 1) / count) for number in range(count)}
    return Part(samples, sorted(set(range(len(samples))) - aside)), Part(samples, sorted(aside))


def _question(scene: Scene, rng: np.random.Generator, taught: bool) -> tuple[str, str]:
    kinds = [kind for kind in ASKED if taught or kind in EXPLAINABLE]
    if not taught and not questions.words_of(scene):
        kinds.remove("read")
    shares = np.array([ASKED[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    if kind == "read":
        asked = questions.read_question(scene)
    elif kind == "locate":
        asked = questions.locate_question(scene, rng)
        kind = "locate" if asked[0].startswith("Where") else "count"
    elif kind == "count":
        asked = questions.count_question(scene)
    else:
        asked = questions.describe_question(scene)
    return asked if taught else (f"{asked[0]} {questions.REPLY_FORMS[kind]}", asked[1])


def _checked_rows(root: Path, kind: str) -> list[dict[str, str]]:
    """The rows of a kind, or every fault in any row."""
    rows, faults = [], []
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found_kind, row = _checked_row(root, line)
        except (ValueError, OSError) as error:
            faults.append(f"{root / METADATA}:{number}: {error}")
            continue
        if found_kind == kind:
            rows.append(row)
    if faults:
        more = f"\n… and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise SampleFileError("\n".join(faults[:SHOWN_FAULTS]) + more)
    if not rows:
        first, second = COLUMNS[kind]
        raise SampleFileError(f"{root / METADATA} has no line with image, {first} and {second}")
    return rows


def _checked_row(root: Path, line: str) -> tuple[str, dict[str, str]]:
    try:
        given: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"a {type(given).__name__}, needed is an object")
    if "file_name" in given:
        given = {"image": given["file_name"], **given}
    kinds = [kind for kind, columns in COLUMNS.items() if set(columns) & set(given)]
    if len(kinds) != 1:
        raise ValueError("needs question and answer, or instruction and target")
    row = {}
    for name in ("image", *COLUMNS[kinds[0]]):
        if not isinstance(given.get(name), str) or not given[name].strip():
            raise ValueError(f"{name} is missing or empty")
        row[name] = given[name]
    sizes = [_size(root / row[name]) for name in ("image", "target") if name in row]
    if len(set(sizes)) > 1:
        raise ValueError(f"the target is {sizes[1]} px, the image {sizes[0]}: make them equal")
    return kinds[0], row


def _size(path: Path) -> tuple[int, int]:
    """px of an image whose bytes are whole."""
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as image:
            size = image.size
            image.verify()
    except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
        raise ValueError(f"{path} is no readable image ({error})") from error
    return size
