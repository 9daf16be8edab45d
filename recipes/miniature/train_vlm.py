"""Train the miniature's source (Qwen3-VL) or target (Qwen2.5-VL) to read, describe, locate and answer.

    python -m recipes.miniature.train_vlm --role source --folder runs/source --steps 16000 --minutes 9

Run it again to continue from the checkpoint; `accelerate launch` or `torchrun` trains on several GPUs.
Prompts have the edit pipeline's template: the states that its transformer reads are those trained here.
"""

from __future__ import annotations

import argparse
import copy
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
from .data import CONDITION, IMAGE, closing, dialogues, encode, reply_rows, small
from .feed import Render, alternating
from .flags import add_prompt_flags, stage_parser
from .loop import Loop, Settings, plot_log, start
from .models import Reader, build_reader

IMAGES = {"source": "full", "target": "small"}


def main() -> None:
    """Train, measure and save."""
    arguments = _arguments()
    accelerator = start(arguments.device)
    seed = arguments.seed + (0 if arguments.role == "source" else 1)
    reader = build_reader(arguments.role, seed, arguments.start)
    if arguments.compile:
        for block in (*reader.model.model.visual.blocks, *reader.model.model.language_model.layers):
            block.compile()
    kinds = {"primer": arguments.primer, "finding": arguments.finding, "reading": arguments.reading}
    settings = Settings.from_flags(arguments, seed)
    loop = Loop(arguments.folder, reader, partial(loss, reader), settings, accelerator)
    loop.resume()
    make = partial(_make, arguments.role, kinds, tuple(arguments.sides))
    loop.run(alternating(make, arguments, accelerator))
    if not accelerator.is_main_process:
        return
    plot_log(arguments.folder)
    with loop.averaged():
        results = measure(reader, arguments)
        save(reader, Path(arguments.output or arguments.folder / arguments.role))
    report = {"role": arguments.role, "command": " ".join(sys.argv), "step": loop.step, **results}
    (arguments.folder / "result.json").write_text(json.dumps(report, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    add_prompt_flags(parser)
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


def loss(reader: Reader, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weighted cross-entropy of the answers' tokens, and the share that is right."""
    logits = reader(batch["images"], batch["text"]).float()
    label, weight = batch["label"].long(), batch["weight"].float()
    errors = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-1, reduction="none")
    right = (logits.argmax(-1) == label).float() * weight
    total = weight.sum()
    return {"loss": (errors.view_as(weight) * weight).sum() / total, "right": right.sum() / total}


def measure(reader: Reader, arguments: argparse.Namespace) -> dict[str, Any]:
    """Letters and words read right, and by kind of instruction how often the answer's first token is.

    On held-out images of the `validation` split; words by greedy decoding. Of the target also the letters
    read right in images reduced to each of the sides that it was trained on.
    """
    role, cases = arguments.role, arguments.cases
    rights = read_letters(reader, role, cases)
    results: dict[str, Any] = {
        "letters": np.mean(np.concatenate(rights)),
        "words": np.mean([all(word) for word in rights]),
        "first_token": {
            f"{group}/{kind}": first_tokens(reader, role, group, kind, max(cases // 10, 1))
            for group in world.GROUPS
            for kind in world.KINDS[group]
        },
    }
    if role == "target":
        results["letters_by_side"] = {
            str(side): np.mean(np.concatenate(read_letters(reader, role, cases, side=side)))
            for side in arguments.sides
        }
    print(json.dumps(results, indent=1), flush=True)
    return results


def read_letters(
    reader: Reader, role: str, cases: int, split: str = "validation", side: int = CONDITION
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
    answers = decode(reader, np.stack(images), questions.read_question(scene)[0])
    rights = []
    for answer, words in zip(answers, wanted, strict=True):
        for read, word in zip(answer.split("/") + [""] * len(words), words, strict=False):
            read = read.ljust(len(word))
            rights.append([a == b for a, b in zip(read, word, strict=False)])
    return rights


def _as_seen(scene: Scene, role: str, side: int = CONDITION) -> np.ndarray:
    image = render(scene)
    return (np.asarray(image) if role == "source" else small(image, side))[None]


@torch.no_grad()
def decode(reader: Reader, images: np.ndarray, prompt: str, most: int = 24) -> list[str]:
    """Greedy replies of at most so many tokens to one prompt about each of the images (N, shown, H, W, 3)."""
    tokenizer, device = tokens.train_bpe(), reader.model.device
    asked, end = torch.tensor([*encode(prompt), *closing()], device=device), closing()[0]
    replies: list[str] = []
    for first in range(0, len(images), 256):
        some = torch.from_numpy(images[first : first + 256]).to(device)
        inputs = reader.inputs(some, asked.expand(len(some), -1))
        ids = reader.model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        replies += [tokenizer.decode(row) for row in rows]  # without special tokens such as the end
    return replies


@torch.no_grad()
def first_tokens(reader: Reader, role: str, group: str, kind: str, cases: int) -> float:
    """How often the last prompt token knows the answer's first token: where, what or which colour."""
    images, texts, places, wanted = [], [], [], []
    for index in range(cases):
        edit = world.make_edit(group, kind, np.random.default_rng([1, 78, index]))
        text, label, _ = reply_rows(edit.prompt, edit.answer)
        place = len(encode(edit.prompt)) + len(closing()) - 1
        images.append(np.concatenate([_as_seen(s, role) for s in (*edit.references, edit.before)]))
        texts.append(text)
        places.append(place)
        wanted.append(label[place])
    shown, text = (torch.from_numpy(np.stack(rows)).to(reader.model.device) for rows in (images, texts))
    known = reader(shown, text).argmax(-1).cpu().numpy()[np.arange(cases), places]
    return float(np.mean(known == wanted))


def save(reader: Reader, folder: Path) -> None:
    """Write the stock model in bf16, with its processor."""
    miniature.save_weights(copy.deepcopy(reader.model).cpu(), folder)
    reader.processor.save_pretrained(folder)


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"{time.time() - started:.0f} s in all")
