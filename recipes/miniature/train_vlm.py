"""Train the miniature's source (Qwen3-VL) or target (Qwen2.5-VL) to read, describe, locate and answer.

    python -m recipes.miniature.train_vlm --role source --folder runs/source --steps 16000 --minutes 9

Run it again to continue from the checkpoint. Prompts have the edit pipeline's template, so that the states
that its transformer reads are the ones trained here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qwen_vision_bridge.case import Scene
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import questions
from qwen_vision_bridge.synthetic.scene import render

from . import build as miniature
from . import tokenizer as tokens
from .data import CONDITION, IMAGE, TEXT_TOKENS, closing, dialogues, encode, reply_rows, small
from .fast import FastModel, build
from .feed import Render
from .loop import Loop, plot_log
from .stepper import compile_if_possible
from .supply import Supply, settings_of, stage_parser

IMAGES = {"source": "full", "target": "small"}


def main() -> None:
    """Train, measure and save."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    seed = arguments.seed + (0 if arguments.role == "source" else 1)
    model = build(arguments.role, seed, arguments.start)
    kinds = {"primer": arguments.primer, "finding": arguments.finding, "reading": arguments.reading}
    render = partial(_make, arguments.role, kinds, tuple(arguments.sides))
    with Supply(arguments, render) as supply:
        model.to(device)
        supply.start()
        compute = partial(loss, model)
        if arguments.compile:
            compile_if_possible(model, compute, supply.layouts(), list(model.parameters()))
        loop = Loop(
            arguments.folder, model, compute, settings_of(arguments, seed), graphs=not arguments.no_graphs
        )
        loop.resume()
        loop.run(supply.batch)
    model.compile_blocks(False)
    plot_log(arguments.folder)
    with loop.averaged():
        results = measure(model, arguments.role, arguments.cases, device)
        if arguments.role == "target":
            results["letters_by_side"] = letters_by_side(model, arguments, device)
        save(model, arguments.role, Path(arguments.output or arguments.folder / arguments.role))
    report = {"role": arguments.role, "command": " ".join(sys.argv), "step": loop.step, **results}
    (arguments.folder / "result.json").write_text(json.dumps(report, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.add_argument("--role", choices=sorted(IMAGES), required=True)
    parser.add_argument("--primer", type=int, default=0, help="samples that only ask for one large word")
    parser.add_argument("--finding", type=float, default=0.0, help="how often a named word is to be found")
    parser.add_argument("--reading", type=float, default=0.0, help="how often the smallest type is read")
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=[CONDITION],
        help="px to which the target's images are "
        f"reduced first, one drawn for each sample; {IMAGE}: not reduced",
    )
    parser.add_argument("--cases", type=int, default=1024, help="held-out images to measure on")
    return parser.parse_args()


def _make(role: str, kinds: dict[str, Any], sides: tuple[int, ...], shown: int) -> Render:
    return partial(rendered, role, kinds, sides, shown)


def rendered(
    role: str, kinds: dict[str, Any], sides: tuple[int, ...], shown: int, first: int, count: int
) -> dict[str, np.ndarray]:
    """One chunk of training data: images as the role sees them, of the kinds that `dialogues` takes."""
    rows = dialogues("train", first, count, shown, sides=sides, **kinds)
    return {"images": rows[IMAGES[role]], **{name: rows[name] for name in ("text", "label", "weight")}}


def loss(model: FastModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weighted cross-entropy of the answers' tokens, and the share that is right."""
    logits = model(batch["images"], batch["text"].int()).float()
    label, weight = batch["label"].long(), batch["weight"].float()
    errors = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-1, reduction="none")
    right = (logits.argmax(-1) == label).float() * weight
    total = weight.sum()
    return {"loss": (errors.view_as(weight) * weight).sum() / total, "right": right.sum() / total}


@torch.no_grad()
def measure(model: FastModel, role: str, cases: int, device: torch.device) -> dict[str, Any]:
    """Letters and words read right, and by kind of instruction how often the answer's first token is.

    On held-out images of the `validation` split; words by greedy decoding.
    """
    rights = read_letters(model, role, cases, device)
    letters = [right for word in rights for right in word]
    read = {"letters": sum(letters) / len(letters), "words": sum(map(all, rights)) / len(rights)}
    seen = {}
    for group in world.GROUPS:
        for kind in world.KINDS[group]:
            seen[f"{group}/{kind}"] = first_tokens(model, role, group, kind, max(cases // 10, 1), device)
    print(f"letters {read['letters']:.3f}  words {read['words']:.3f}", flush=True)
    print("  ".join(f"{name.split('/')[1]} {value:.2f}" for name, value in seen.items()), flush=True)
    return {**read, "first_token": seen}


def read_letters(
    model: FastModel,
    role: str,
    cases: int,
    device: torch.device,
    split: str = "validation",
    side: int = CONDITION,
) -> list[list[bool]]:
    """For every word in `cases` held-out images, which letters are read right, by greedy decoding.

    Args:
        side: px to which the target's images are reduced first.
    """
    images, wanted = [], []
    kinds = [kind for kind in world.KINDS["ocr"] if kind != "spell_digit"]
    for index in range(cases):
        rng = np.random.default_rng([world.SPLITS.index(split), 77, index])
        scene = world.make_edit("ocr", kinds[index % len(kinds)], rng).before
        wanted.append([block.text for block in questions.words_of(scene)])
        images.append(_as_seen(scene, role, side))
    said = decode(model, np.stack(images), questions.read_question(scene)[0], 24, device)
    rights = []
    for text, words in zip(said, wanted, strict=True):
        for heard, word in zip(text.split("/") + [""] * len(words), words, strict=False):
            heard = heard.ljust(len(word))
            rights.append([a == b for a, b in zip(heard, word, strict=False)])
    return rights


def letters_by_side(
    model: FastModel, arguments: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """How many letters the target reads right in images reduced to each of the sides it was trained on."""
    found = {}
    for side in arguments.sides:
        rights = read_letters(model, "target", arguments.cases, device, side=side)
        letters = [right for word in rights for right in word]
        found[str(side)] = sum(letters) / len(letters)
    print("letters by side", {side: round(share, 3) for side, share in found.items()}, flush=True)
    return found


def _as_seen(scene: Scene, role: str, side: int = CONDITION) -> np.ndarray:
    image = render(scene)
    return (np.asarray(image) if role == "source" else small(image, side))[None]


@torch.no_grad()
def decode(model: FastModel, images: np.ndarray, prompt: str, most: int, device: torch.device) -> list[str]:
    """Greedy replies to one prompt about each of the images (N, shown, H, W, 3)."""
    tokenizer, asked, end = tokens.train_bpe(), encode(prompt), closing()
    replies = []
    for first in range(0, len(images), 256):
        shown = torch.from_numpy(images[first : first + 256]).to(device)
        text = torch.zeros(len(shown), TEXT_TOKENS, dtype=torch.long, device=device)
        start = len(asked) + len(end)
        text[:, :start] = torch.tensor([*asked, *end], device=device)
        for place in range(start, min(start + most, TEXT_TOKENS)):
            text[:, place] = model(shown, text)[:, place - 1].argmax(-1)
            if (text[:, start : place + 1] == end[0]).any(1).all():  # every reply has ended
                break
        for row in text[:, start:].tolist():
            row = row[: row.index(end[0])] if end[0] in row else row
            replies.append(tokenizer.decode(row))
    return replies


def first_tokens(
    model: FastModel, role: str, group: str, kind: str, cases: int, device: torch.device
) -> float:
    """How often the last prompt token knows the answer's first token: where, what or which colour."""
    rows: dict[str, list[Any]] = {"images": [], "text": [], "place": [], "wanted": []}
    for index in range(cases):
        edit = world.make_edit(group, kind, np.random.default_rng([1, 78, index]))
        scenes = (*edit.references, edit.before)
        text, label, _ = reply_rows(edit.prompt, edit.answer)
        place = len(encode(edit.prompt)) + len(closing()) - 1
        values = np.concatenate([_as_seen(s, role) for s in scenes]), text, place, label[place]
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    images = torch.from_numpy(np.stack(rows["images"])).to(device)
    text = torch.from_numpy(np.stack(rows["text"])).to(device).int()
    logits = model(images, text)[
        torch.arange(cases, device=device), torch.tensor(rows["place"], device=device)
    ]
    return float(
        (logits.argmax(-1).cpu() == torch.from_numpy(np.stack(rows["wanted"])).long()).float().mean()
    )


def save(model: FastModel, role: str, folder: Path) -> None:
    """Write the stock model in bf16, with its processor."""
    import copy

    stock = copy.deepcopy(model.model).cpu()
    miniature.save_weights(stock, folder)
    processor = miniature.source_processor() if role == "source" else miniature.target_processor()
    processor.save_pretrained(folder)


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"{time.time() - started:.0f} s in all")
