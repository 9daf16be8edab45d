"""Training data of the miniature, rendered from seeds: sample i of a split is the same on every machine."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image

from qwen_vision_bridge.case import Edit
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.specs import TARGET_PX
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import questions
from qwen_vision_bridge.synthetic.scene import render

from . import tokenizer as tokens

IMAGE = 128  # px a side: what source, VAE and cases have
CONDITION = isqrt(FAMILIES["miniature"].editor.condition_area or 0)  # px: to what the pipeline reduces it,
SMALL = TARGET_PX  # and then the target's processor
PROMPT_TOKENS = 32  # the longest prompt with the template's end, padded
TEXT_TOKENS = 64  # the same with the longest answer
SEEN_AHEAD = 8  # of the nine tokens that end the template: they predict the answer's first tokens
ONE_IMAGE = [(g, kind) for g in ("ocr", "space", "detail") for kind in world.KINDS[g]]
TWO_IMAGES = [("consistency", kind) for kind in world.KINDS["consistency"]]
FINDING = [
    *(("ocr", kind) for kind in world.REFERRING_WORDS),
    *(("space", kind) for kind in ("marked", "striped", "dotted")),
]
WRITING = ("change_text", "append_letter", "copy_text")  # the hardest pixels: drawn more often


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return tokens.train_bpe()


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=8)
def opening(images: int) -> tuple[tuple[int, ...], int]:
    """Token ids from the template's start to the prompt, one pad an image token, and how many are dropped."""
    slots = 64 * "<|image_pad|>"
    shown = (f"Picture {i + 1}: <|vision_start|>{slots}<|vision_end|>" for i in range(images))
    return tuple(encode(tokens.TEMPLATE_PREFIX + "".join(shown))), tokens.TEMPLATE_PREFIX_TOKENS


def closing() -> list[int]:
    """Token ids from the end of the prompt to the answer."""
    return encode("<|im_end|>\n<|im_start|>assistant\n")


def small(image: Image.Image, side: int = CONDITION) -> np.ndarray:
    """The image as the target sees it, uint8 (SMALL, SMALL, 3).

    Args:
        side: px to which it is resized first: the pipeline does so to CONDITION; IMAGE keeps it.
    """
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BICUBIC))


def _stream(split: str, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng([world.SPLITS.index(split), 1000 + purpose, index])


def _edit(rng: np.random.Generator, images: int, writing: float) -> tuple[str, Edit]:
    options = ONE_IMAGE if images == 1 else TWO_IMAGES
    group, kind = options[int(rng.integers(len(options)))]
    if images == 1 and rng.random() < writing:
        group, kind = "ocr", WRITING[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    zoom = 1.0 if rng.random() < 0.5 else float(rng.uniform(1.2, 1.7))
    return kind, world.make_edit(group, kind, rng, IMAGE, zoom=zoom)


def _finding(rng: np.random.Generator) -> Edit:
    group, kind = FINDING[int(rng.integers(len(FINDING)))]
    return world.make_edit(group, kind, rng, IMAGE, zoom=float(rng.uniform(1.0, 1.7)))


def _small_type(rng: np.random.Generator) -> Edit:
    return world.make_edit("ocr", world.REFERRING_WORDS[int(rng.integers(3))], rng, IMAGE)


def _prompt(edit: Edit, rng: np.random.Generator) -> str:
    return edit.explicit_prompt if edit.explicit_prompt and rng.random() < 0.25 else edit.prompt


def images(split: str, first: int, count: int) -> np.ndarray:
    """World images for the VAE: uint8 (count, 128, 128, 3)."""
    shown = []
    for index in range(first, first + count):
        rng = _stream(split, 0, index)
        _, edit = _edit(rng, 1, 0.15)
        shown.append(np.asarray(render(edit.after if rng.random() < 0.5 else edit.before)))
    return np.stack(shown)


def dialogues(
    split: str,
    first: int,
    count: int,
    shown: int = 1,
    asked: float = 0.5,
    primer: int = 0,
    finding: float = 0.0,
    reading: float = 0.0,
    sides: tuple[int, ...] = (CONDITION,),
) -> dict[str, np.ndarray]:
    """Images with an instruction or a question and its answer.

    Args:
        shown: images a dialogue.
        asked: share of questions about the image, beside instructions.
        finding: share of prompts that name a word or letter to find, mostly well legible: comparing prompt
            and image is a skill that reading does not teach.
        reading: share of images with the smallest type whose words are asked for.
        sides: px to which images are resized before the target sees them, one drawn for each sample. With
            larger ones than the pipeline's it learns to read finer features than the pipeline gives it.
        primer: samples below this index show one large word and ask for it, from which reading starts.

    Returns:
        `full` uint8 (count, shown, 128, 128, 3) and `small` (…, SMALL, SMALL, 3); `text` int16 (count, T)
        from the prompt on; `label` (count, T), the token to predict at each position or -1; `weight` uint8
        (count, T).
    """
    rows: dict[str, list[np.ndarray]] = {"full": [], "small": [], "text": [], "label": [], "weight": []}
    for index in range(first, first + count):
        rng = _stream(split, shown, index)
        is_primer = shown == 1 and index < primer
        sought = shown == 1 and not is_primer and rng.random() < finding
        read = shown == 1 and not is_primer and not sought and rng.random() < reading
        if sought or read:
            edit = _finding(rng) if sought else _small_type(rng)
        else:
            edit = _edit(rng, shown, 1.0 if is_primer else 0.0)[1]
        scene = edit.before
        if read:
            prompt, answer = questions.read_question(scene)
        elif sought and rng.random() < 0.5:
            prompt, answer = questions.locate_question(scene, rng)
        elif sought:
            prompt, answer = edit.prompt, edit.answer
        elif is_primer:
            prompt, answer = questions.read_question(scene)
        elif shown == 1 and rng.random() < asked:
            scene = edit.after if rng.random() < 0.4 else edit.before
            prompt, answer = questions.ask(scene, rng)
        else:
            prompt, answer = _prompt(edit, rng), edit.answer
        seen = [render(other) for other in (*edit.references, scene)]
        rows["full"].append(np.stack([np.asarray(image) for image in seen]))
        side = sides[int(rng.integers(len(sides)))]
        rows["small"].append(np.stack([small(image, side) for image in seen]))
        for name, row in zip(("text", "label", "weight"), reply_rows(prompt, answer), strict=True):
            rows[name].append(row)
    return {name: np.stack(values) for name, values in rows.items()}


def reply_rows(prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens from the prompt on, labels (-1: none) and their weights, each (T,).

    An edit pipeline reads no answer, only the nine tokens that end the template. The last of them predicts
    the answer's first token, as always, and the ones before it the second to the eighth: hidden states of
    the prompt so carry the answer, a whole word and its position included.
    """
    asked, end = encode(prompt), closing()
    replied = [*encode(answer), end[0]]
    ids = [*asked, *end, *replied]
    if len(ids) > TEXT_TOKENS or len(asked) + len(end) > PROMPT_TOKENS:
        raise ValueError(f"{len(ids)} tokens of {prompt!r} and {answer!r}; room is for {TEXT_TOKENS}")
    text, label, weight = (np.full(TEXT_TOKENS, fill, np.int16) for fill in (0, -1, 0))
    text[: len(ids)] = ids
    start = len(asked) + len(end) - 1  # the last token before the answer
    label[start : start + len(replied)] = replied
    weight[start : start + len(replied)] = 1
    for ahead in range(SEEN_AHEAD):
        if ahead < len(replied):
            label[start - ahead] = replied[ahead]
            weight[start - ahead] = 3 if ahead == 0 else 1
    return text, label, weight.astype(np.uint8)


def edit_pairs(
    split: str, first: int, count: int, shown: int = 1, writing: float = 0.2
) -> dict[str, np.ndarray]:
    """Instructions with their images before and after.

    Args:
        writing: share of prompts for a new word, in addition to the ones among all kinds.

    Returns:
        `full` uint8 (count, shown, 128, 128, 3), the last of each being the one to edit; `small` (…, SMALL,
        SMALL, 3); `after` (count, 128, 128, 3); `text` int16 (count, P), prompt and template's end; `length`
        (count,), its tokens.
    """
    rows: dict[str, list[Any]] = {"full": [], "small": [], "after": [], "text": [], "length": []}
    for index in range(first, first + count):
        rng = _stream(split, 10 + shown, index)
        _, edit = _edit(rng, shown, writing)
        seen = [render(scene) for scene in (*edit.references, edit.before)]
        rows["full"].append(np.stack([np.asarray(image) for image in seen]))
        rows["small"].append(np.stack([small(image) for image in seen]))
        rows["after"].append(np.asarray(render(edit.after)))
        text, length = prompt_row(_prompt(edit, rng))
        rows["text"].append(text)
        rows["length"].append(length)
    return {name: np.stack(values) for name, values in rows.items()}


def prompt_row(prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a prompt and the template's end, padded to (P,), and their number."""
    ids = [*encode(prompt), *closing()]
    if len(ids) > PROMPT_TOKENS:
        raise ValueError(f"{len(ids)} tokens of {prompt!r}; room is for {PROMPT_TOKENS}")
    row = np.zeros(PROMPT_TOKENS, np.int16)
    row[: len(ids)] = ids
    return row, np.int16(len(ids))
