"""Perception without an edit: the frozen target's language model is asked about an image through a bridge.

No transformer and no VAE run. Replies are decoded greedily, so equal features give equal replies.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..cache import VisionCache
from ..injection import Levels, inject
from ..loading.locks import model_lock
from ..patches import batched_vision, condition_size, mrope_positions
from ..synthetic.questions import REPLY_FORMS, Question
from .arms import Arm

if TYPE_CHECKING:
    from ..pipeline import EnhancedQwenImageEdit

LONGEST_REPLY = 32  # tokens: three words of six letters and their slashes, a token a letter at worst


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
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    arguments["pixel_values"] = inputs["pixel_values"].to(pipe.text_encoder.dtype)
    if pipeline.options.mrope == "fixed":  # as in an edit, see `patches.mrope_positions`
        arguments["mm_token_type_ids"] = (ids == pipe.text_encoder.config.image_token_id).int()
    encoder: AbstractContextManager[object] = nullcontext()
    if arm.bridge is not None and source is not None:
        encoder = inject(pipe, arm.bridge, source, arm.strength, arm.site)
    towers = batched_vision(pipe, pipeline.options.vision_attention)
    positions = mrope_positions(pipe, pipeline.options.mrope)  # puts back what generating leaves behind
    with model_lock, encoder, towers, positions:
        reply = pipe.text_encoder.generate(
            **arguments, max_new_tokens=LONGEST_REPLY, do_sample=False, num_beams=1
        )
    return pipe.tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _prompt(pipeline: EnhancedQwenImageEdit, question: Question) -> str:
    pipe = pipeline.pipe
    if not pipeline.family.chat_template:
        image = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        return pipe.prompt_template_encode.format(image + question.text)
    text = f"{question.text} {REPLY_FORMS[question.kind]}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
