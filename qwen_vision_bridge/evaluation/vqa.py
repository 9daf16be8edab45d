"""Perception without an edit: the frozen target's language model is asked about an image through a bridge.

No transformer and no VAE run. Replies are decoded greedily, so equal features give equal replies.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..cache import VisionCache
from ..injection import Levels, inject
from ..loading.locks import model_lock
from ..patches import batched_vision, condition_size, mrope_positions
from ..synthetic.cases import Case, locate_question, read_question
from .arms import Arm
from .metrics import pixels as metrics

if TYPE_CHECKING:
    from ..pipeline import EnhancedQwenImageEdit

LONGEST_REPLY = 32  # tokens: three words of six letters and their slashes, a token a letter at worst
BOARD = "abcdefgh"
FARTHEST = 2**0.5  # sides of the image: what a reply that names no square counts as
# Families outside the miniature were not taught how to reply.
EXPLAINED = {
    "read": "Reply with the text alone, lines from top to bottom with a slash between them.",
    "locate": (
        "Think of a board of 8 by 8 squares over the image. Reply with two letters alone: the column, a "
        "(left) to h (right), then the row, a (top) to h (bottom)."
    ),
    "count": "Reply with a number alone.",
}


class Question(NamedTuple):
    """Something to ask about the last image of a case."""

    kind: Literal["read", "locate", "count"]
    text: str
    answer: str


def questions_of(case: Any) -> list[Question]:
    """What to ask about a case's image: nothing where its scene is not known."""
    scene = case.edit.before if isinstance(case, Case) and case.edit is not None else None
    if scene is None:
        known = getattr(case, "whole_text", None)
        return [Question("read", "What does it say?", known)] if known else []
    asked = [Question("count", "How many shapes are there?", str(len(scene.objects)))]
    text, answer = locate_question(scene, np.random.default_rng(zlib.crc32(case.case_id.encode())))
    if text.startswith("Where"):
        asked.insert(0, Question("locate", text, answer))
    if case.source_text is not None:
        asked.insert(0, Question("read", *read_question(scene)))
    return asked


@torch.inference_mode()
def ask(
    pipeline: EnhancedQwenImageEdit,
    image: Image.Image,
    question: Question,
    arm: Arm,
    source: VisionCache | Levels | None,
) -> str:
    """The reply of the target's language model, which sees the image as the edit pipeline shows it.

    The miniature is asked in the edit pipeline's own template, in which it was trained; others in their chat
    template, with the form of the reply explained.

    Args:
        source: as `injection.inject`; None for the baseline.
    """
    pipe = pipeline.pipe
    width, height = condition_size(type(pipe), pipeline.family.editor, image)
    shown = pipe.image_processor.resize(image, height, width)
    inputs = pipe.processor(text=[_prompt(pipeline, question)], images=[shown], return_tensors="pt")
    inputs = inputs.to(pipe.text_encoder.device)
    ids = inputs["input_ids"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    given["pixel_values"] = inputs["pixel_values"].to(pipe.text_encoder.dtype)
    if pipeline.options.mrope == "fixed":  # as in an edit, see `patches.mrope_positions`
        given["mm_token_type_ids"] = (ids == pipe.text_encoder.config.image_token_id).int()
    encoder = nullcontext()
    if arm.bridge is not None:
        encoder = inject(pipe, arm.bridge, source, arm.strength, arm.site)
    towers = batched_vision(pipe, pipeline.options.vision_attention)
    positions = mrope_positions(pipe, pipeline.options.mrope)  # puts back what generating leaves behind
    with model_lock, encoder, towers, positions:
        reply = pipe.text_encoder.generate(
            **given, max_new_tokens=LONGEST_REPLY, do_sample=False, num_beams=1
        )
    return pipe.tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True).strip()


def score(question: Question, reply: str) -> dict[str, float]:
    """How right a reply is.

    Returns:
        `answered`, 1.0 where it is exactly right (spaces and case aside), else 0.0; and by kind
        `reply_similarity` (`metrics.edit_similarity`), `location_error` (distance of the squares' centres in
        sides of the image; √2 where no square is named) or `count_error` (absolute; 8 where no number is).
    """
    values = {"answered": metrics.exact_text(reply, question.answer)}
    if question.kind == "read":
        values["reply_similarity"] = metrics.edit_similarity(reply, question.answer)
    elif question.kind == "locate":
        values["location_error"] = _distance(reply, question.answer)
    else:
        number = int(reply) if reply.isdecimal() and len(reply) < 3 else None
        values["count_error"] = 8.0 if number is None else min(float(abs(number - int(question.answer))), 8.0)
    return values


def _distance(reply: str, answer: str) -> float:
    square = reply.strip().casefold()
    if len(square) != 2 or not set(square) <= set(BOARD):
        return FARTHEST
    places: Sequence[np.ndarray] = [
        np.array([BOARD.index(letter) for letter in name]) for name in (square, answer)
    ]
    return float(np.linalg.norm(places[0] - places[1]) / len(BOARD))


def _prompt(pipeline: EnhancedQwenImageEdit, question: Question) -> str:
    pipe = pipeline.pipe
    if not pipeline.family.chat_template:
        image = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        return pipe.prompt_template_encode.format(image + question.text)
    text = f"{question.text} {EXPLAINED[question.kind]}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
