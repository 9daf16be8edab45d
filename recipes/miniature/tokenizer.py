"""The miniature's tokenizer: Qwen2's format, one token a word of the world and one a letter of all else."""

from __future__ import annotations

import json
import re
from typing import Any

from qwen_vision_bridge.training.frozen_lm import TEMPLATE_PREFIX as TEMPLATE_PREFIX
from qwen_vision_bridge.training.frozen_lm import TEMPLATE_PREFIX_TOKENS as TEMPLATE_PREFIX_TOKENS

SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in [
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    ]
)
PRETOKENIZE_REGEX = (  # Qwen2's, as transformers has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The words of the template and of the world are the tokenizer's whole corpus: each becomes one token, which
# is what makes the prefix come out at exactly 64. Other text, such as every word in quotes, becomes letters.
STARTING_WORDS = """
Add Align Append Bring Change Copy Delete Describe Double Draw Drop Erase Exchange Give How Keep Let Line Make
Move Order Paint Picture Place Put Recolour Remove Repeat Replace Reverse Sort Spell Swap Take Use What Where
Write beige bricks brown checks dark dots grey light marble mint navy nothing rose stripes waves wood
"""
FOLLOWING_WORDS = """
above after again all alphabetical and appears are as at away background backwards be beige below blue bottom
bricks brown but centre change checks circle colour corner cross cyan dark diamond digit does dots else end
erase every everything from green grey has height highest in instead is it its itself keep largest last left
leftmost letter letters light like lowest many marble middle mint navy nothing number of once only orange
order other others out picture pink place places purple read red remove rest reverse right rightmost rose row
same say second shape shapes side smallest square star stripes text texture that the there to top triangle
twice two up vowel vowels waves whose with wood word words yellow
"""
VOCABULARY = 840  # the 838 that the corpus gives, rounded up
SQUARES = tuple(column + row for column in "abcdefgh" for row in "abcdefgh")  # places, see edits.square
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Any:
    """Byte-level BPE in the Qwen2 format: bytes, merges of the corpus' words, Qwen's special tokens."""
    from transformers import Qwen2Tokenizer

    model = json.loads(train_bpe().to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    length = len(tokenizer(TEMPLATE_PREFIX)["input_ids"])
    if length != TEMPLATE_PREFIX_TOKENS:
        raise RuntimeError(
            f"the template prefix is {length} tokens, the edit pipelines cut {TEMPLATE_PREFIX_TOKENS}"
        )
    return tokenizer


def train_bpe() -> Any:
    """The same as a `tokenizers.Tokenizer`, which loads without transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([pieces, as_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    following = [f" {word}" for word in FOLLOWING_WORDS.split()]
    corpus = [*re.split(r"<\|im_\w+\|>", TEMPLATE_PREFIX), *STARTING_WORDS.split(), *following, *SQUARES]
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return bpe
