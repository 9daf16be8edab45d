"""Training samples: questions about images with their answers, and edits with their results.

They come from the synthetic world, a user's folder or a Hugging Face dataset. A user's data is checked before
a model is loaded; every fault is reported with its file and line.

A folder holds `metadata.jsonl`, one object a line: `image` (or `file_name`, as in the `imagefolder`
convention) with `question` and `answer`, or with `instruction` and `target`, an image of the same size.
Paths are relative to the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
from PIL import Image
from torch.utils import data as utils_data

from ..case import Scene
from ..images import load_images
from ..io import digest_of, json_lines, parse_object, path_inside
from ..loading.towers import load_processor
from ..pairs import check_length, check_shape
from ..specs import Family, check_prompt
from ..synthetic import cases as world
from ..synthetic import questions
from ..synthetic.scene import render
from .config import METADATA, WORLD_SAMPLES, Kind, RunConfig, check_data_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = TypeVar("Part")
COLUMNS: dict[Kind, tuple[str, str]] = {"perceive": ("question", "answer"), "edit": ("instruction", "target")}
MAX_FAULTS = 20  # that a message lists
# A model that knows the world is asked what an instruction means; other questions have these shares.
INSTRUCTION_SHARE = 0.3
QUESTION_SHARES = {"read": 0.45, "locate": 0.2, "count": 0.05, "describe": 0.3}
ASK = {
    "read": questions.read_question,
    "count": questions.count_question,
    "describe": questions.describe_question,
}
EXPLAINABLE = ("read", "locate", "count")  # questions for models that were not trained on the world
ONE_IMAGE = tuple((group, kind) for group in ("ocr", "space", "detail") for kind in world.KINDS[group])


class Sample(NamedTuple):
    """One image with a question and its answer, or with an instruction and its result."""

    image: Image.Image
    prompt: str
    answer: str | None = None
    """The language model's answer; None for an edit."""
    after: Image.Image | None = None
    """The edited image, as large as `image`; None for a question."""


class Samples(Protocol):
    """A list of samples that are rendered or read one at a time, in any process."""

    @property
    def digest(self) -> str:
        """Changes whenever a sample does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Split(NamedTuple, Generic[Part]):
    """Samples, or what is computed from them, to train on and to validate on."""

    train: Part
    validation: Part


class SampleFileError(ValueError):
    """Faults in a user's data, each on a line with file and line number."""


class WorldSamples:
    """Samples of a split of the synthetic world, the same on every machine.

    Args:
        knows_world: whether the target was trained on the world and knows its forms of answers; others are
            only asked to read, locate and count, with the form explained.
        size: px of an image's side.
        first: index in the split of the first sample.
    """

    def __init__(
        self, kind: Kind, split: str, count: int, knows_world: bool = True, size: int = 128, first: int = 0
    ) -> None:
        if kind not in get_args(Kind) or split not in world.SPLITS:
            raise ValueError(f"samples are of a kind and a split of the world, not {kind!r}, {split!r}")
        self.kind, self.split, self.count = kind, split, count
        self.knows_world, self.size, self.first = knows_world, size, first
        self.digest = digest_of(
            ["world", kind, split, first, count, knows_world, size, QUESTION_SHARES, INSTRUCTION_SHARE]
        )

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
        if self.knows_world and rng.random() < INSTRUCTION_SHARE:
            return Sample(render(edit.before), edit.prompt, edit.answer)
        scene = edit.after if rng.random() < 0.4 else edit.before
        return Sample(render(scene), *_question(scene, rng, self.knows_world))


class _UserSamples:
    """Samples of one kind from rows with the user's columns; images are files or decoded."""

    kind: Kind
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        (image,) = load_images(row["image"], 1)
        if self.kind == "perceive":
            return Sample(image, row["question"], row["answer"])
        (after,) = load_images(row["target"], 1)
        if image.size != after.size:
            raise SampleFileError(
                f"row {index}: the target is {after.size} px, the image {image.size}: make them equal"
            )
        return Sample(image, row["instruction"], after=after)


class FolderSamples(_UserSamples):
    """The samples of one kind in a user's folder, all of them checked.

    Args:
        family: whose models they are for; None checks neither the length of texts nor the shape of images.

    Raises:
        FileNotFoundError: no such folder, or no `metadata.jsonl` in it.
        SampleFileError: every fault in it.
    """

    def __init__(self, folder: str | Path, kind: Kind, family: Family | None = None) -> None:
        root, files = Path(folder).expanduser(), ("image", "target")
        check_data_folder(root)
        rows = _checked_rows(root, kind, family)
        sizes = [[(root / row[name]).stat().st_size for name in files if name in row] for row in rows]
        self.kind, self.digest = kind, digest_of(["folder", kind, rows, sizes])
        self.rows = [{k: root / v if k in files else v for k, v in row.items()} for row in rows]


class DatasetSamples(_UserSamples):
    """The samples of one kind in a Hugging Face dataset with the folder's columns; images are `Image`s.

    Raises:
        ValueError: the `datasets` package is not installed, or a column is missing.
    """

    def __init__(self, name: str, kind: Kind) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "--dataset_name needs the package `datasets`, which is not installed: `uv run --with "
                "datasets python train_bridge.py …`, or give a folder with --train_data_dir"
            ) from error
        self.kind: Kind = kind
        self.rows: Any = datasets.load_dataset(name, split="train")
        columns, needed = self.rows.column_names, {"image", *COLUMNS[kind]}
        if missing := sorted(needed - set(columns)):
            raise ValueError(
                f"the dataset {name} has no column {missing[0]!r}, only {', '.join(columns)}; "
                f"for --method {kind} it needs {', '.join(sorted(needed))}"
            )
        self.digest = digest_of(["dataset", name, "train", kind, self.rows._fingerprint])


class Subset(utils_data.Subset):
    """Some of the samples of a list, by index."""

    @property
    def digest(self) -> str:
        """Digest of the whole list and the indices."""
        return digest_of([self.dataset.digest, self.indices])


def load_samples(run: RunConfig, kind: Kind) -> Split[Samples]:
    """Samples to train on and to validate on, checked.

    Raises:
        FileNotFoundError, ValueError: missing or faulty data.
    """
    if run.is_world:
        knows_world, size = run.family.synthetic_only, run.family.image_size
        count = run.max_train_samples or WORLD_SAMPLES
        return Split(
            WorldSamples(kind, "train", count, knows_world, size),
            WorldSamples(kind, "validation", run.validation_samples, knows_world, size),
        )
    samples: Samples
    if run.train_data_dir is None:
        samples = DatasetSamples(str(run.dataset_name), kind)
    else:
        samples = FolderSamples(run.train_data_dir, kind, run.family)
    train, validation = split_samples(samples, run.validation_samples)
    return Split(Subset(samples, train.indices[: run.max_train_samples]), validation)


def split_samples(samples: Samples, max_held_out: int) -> Split[Subset]:
    """Split off evenly spread samples to validate on, at most `max_held_out` and a tenth of all.

    Raises:
        ValueError: a single sample, which cannot be split.
    """
    if len(samples) < 2:
        raise ValueError(f"training needs at least two samples, one to validate on; got {len(samples)}")
    count = max(1, min(max_held_out, int(0.1 * len(samples))))
    held_out = {round(number * (len(samples) - 1) / count) for number in range(count)}
    rest = sorted(set(range(len(samples))) - held_out)
    return Split(Subset(samples, rest), Subset(samples, sorted(held_out)))


def _question(scene: Scene, rng: np.random.Generator, knows_world: bool) -> tuple[str, str]:
    kinds = [kind for kind in QUESTION_SHARES if knows_world or kind in EXPLAINABLE]
    if not knows_world and not questions.words_of(scene):
        kinds.remove("read")
    shares = np.array([QUESTION_SHARES[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    if kind == "locate":
        asked = questions.locate_question(scene, rng)
        kind = "locate" if asked[0].startswith("Where") else "count"
    else:
        asked = ASK[kind](scene)
    return asked if knows_world else (f"{asked[0]} {questions.REPLY_FORMS[kind]}", asked[1])


def _checked_rows(root: Path, kind: Kind, family: Family | None) -> list[dict[str, str]]:
    """The rows of a kind, or every fault in any row."""
    rows, faults = [], []
    lines = json_lines(root / METADATA)
    with ThreadPoolExecutor() as pool:  # every image is decoded
        checks = [pool.submit(_checked_row, root, line, family) for _, line in lines]
    for (place, _), check in zip(lines, checks, strict=True):
        try:
            row_kind, row = check.result()
        except (ValueError, TypeError, OSError) as error:
            faults.append(f"{place}: {error}")
            continue
        if row_kind == kind:
            rows.append(row)
    if faults:
        more = f"\n… and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise SampleFileError("\n".join(faults[:MAX_FAULTS]) + more)
    if not rows:
        first, second = COLUMNS[kind]
        raise SampleFileError(f"{root / METADATA} has no line with image, {first} and {second}")
    return rows


def _checked_row(root: Path, line: bytes, family: Family | None) -> tuple[Kind, dict[str, str]]:
    data = parse_object(line, "the line")
    if "file_name" in data:
        data = {"image": data["file_name"], **data}
    kinds = [kind for kind, columns in COLUMNS.items() if set(columns) & set(data)]
    if len(kinds) != 1:
        raise ValueError("needs question and answer, or instruction and target")
    names = ("image", *COLUMNS[kinds[0]])
    for name in names:
        if not isinstance(data.get(name), str) or not data[name].strip():
            raise ValueError(f"{name} is missing or empty")
    row = {name: data[name] for name in names}
    for name in ("question", "answer", "instruction"):
        if name in row:
            check_prompt(row[name], f"the {name}")
            if family is not None:
                check_length(partial(_tokenizer, family), row[name])
    files = [path_inside(root, row[name]) for name in ("image", "target") if name in row]
    images = load_images(files, 1 if family is None else family.target.token_px)
    if len({image.size for image in images}) > 1:
        raise ValueError(f"the target is {images[1].size} px, the image {images[0].size}: make them equal")
    if family is not None and kinds[0] == "edit":
        check_shape(images[0], family.editor)
    return kinds[0], row


@cache
def _tokenizer(family: Family) -> PreTrainedTokenizerBase:
    target = family.target
    return load_processor(target.repo, target.processor_subfolder, target.revision, False).tokenizer
