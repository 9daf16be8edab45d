"""The target's frozen language model on precomputed vision features: its answers and their cross-entropy.

The stock modules run as they are, through `inputs_embeds`; gradients reach the features and stop at the
weights. All texts of a batch follow images on one grid, so the template before the image is the same in
every batch: its keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..specs import Family

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, Qwen2_5_VLProcessor

MAX_TEXT = 512  # tokens after the image
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE_PREFIX_TOKENS = 64  # what the edit pipelines cut off the front of every prompt
TEMPLATE_PREFIX = (  # the edit pipelines' template up to the images
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n"
)
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"


class TextBatch(NamedTuple):
    """Tokens of texts that follow an image, padded on the right to one length."""

    ids: Tensor
    """(n, T), prompt and answer."""
    labels: Tensor
    """(n, T): the token to predict at each position, -1 for none."""
    weights: Tensor
    """(n, T): loss weight of each label."""
    prompt_lengths: Tensor
    """(n,): tokens before the answer."""

    def select(self, index: Tensor | slice) -> TextBatch:
        """Take some of the texts."""
        return TextBatch(*(part[index] for part in self))

    def trimmed(self, min_length: int = 1) -> TextBatch:
        """Remove padding that no text needs."""
        labelled = (self.labels >= 0).any(0).nonzero()
        answered = int(labelled[-1]) + 2 if len(labelled) else 0
        length = max(int(self.prompt_lengths.max()), answered, min_length)
        ids, labels, weights = (part[:, :length] for part in self[:3])
        return TextBatch(ids, labels, weights, self.prompt_lengths)

    def to(self, device: torch.device) -> TextBatch:
        """Move to a device."""
        return TextBatch(*(part.to(device, non_blocking=True) for part in self))


@dataclass(frozen=True)
class Prefix:
    """Everything up to the end of an image on one grid, which all texts share."""

    ids: Tensor
    """(P,)"""
    start: int
    """Position of the first image token; the last is P − 2, then the image ends."""
    positions: Tensor
    """(3, 1, P + MAX_TEXT)"""
    cache: list[tuple[Tensor, Tensor]] | None
    """Keys and values (1, H, start, D) of the tokens before the image, one pair a layer."""
    states: Tensor | None
    """(1, start, D): their hidden states. Both are None where every batch computes them."""


class FrozenLanguageModel:
    """A frozen Qwen2.5-VL on precomputed vision features.

    Args:
        model: the stock model, or an edit pipeline's text encoder.
        processor: the stock processor.
        family: decides the template: the miniature answers in the edit pipelines', in which it was trained,
            others in their chat template.
        checkpointing: recompute activations of the layers; the template's keys are then not cached.
        trainable: whether weights of the model learn, as a LoRA's do; nothing is then cached.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Qwen2_5_VLProcessor,
        family: Family,
        checkpointing: bool = False,
        trainable: bool = False,
    ) -> None:
        self.model, self.processor, self.family = model.eval(), processor, family
        if not trainable:
            model.requires_grad_(False)
        self.decoder = model.model.language_model
        self.device = self.decoder.embed_tokens.weight.device
        self.caches_prefix = not (checkpointing or trainable)
        if checkpointing:  # acts in training mode only; these models have no dropout that is on
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self.decoder.train()
        self._prefixes: dict[tuple[str, tuple[int, int]], Prefix] = {}

    def template(self, prompt: str, edit: bool = False) -> tuple[str, str]:
        """Put a prompt into its template: up to the end of the image, and from there to the answer."""
        if edit or not self.family.chat_template:
            label = "" if self.family.editor.pipeline_class == "QwenImageEditPipeline" else "Picture 1: "
            return f"{TEMPLATE_PREFIX}{label}{IMAGE}", prompt + CLOSING
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, end, after = text.partition("<|vision_end|>")
        return before + end, after

    def tokenize(self, texts: Sequence[tuple[str, str | None]], edit: bool = False) -> TextBatch:
        """Turn prompts and answers into tokens with labels.

        Raises:
            ValueError: a text of more than `MAX_TEXT` tokens.
        """
        prompts = self._token_ids([self.template(prompt, edit)[1] for prompt, _ in texts])
        end = self._token_ids(["<|im_end|>"])[0]
        answers = self._token_ids([answer or "" for _, answer in texts])
        answers = [[*ids, *end] if texts[i][1] is not None else [] for i, ids in enumerate(answers)]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        if longest > MAX_TEXT:
            raise ValueError(
                f"a prompt with its answer has {longest} tokens; at most {MAX_TEXT} are possible"
            )
        lookahead = self.family.reply_tokens  # so many of the prompt's last tokens predict the answer
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        labels, weights = torch.full_like(ids, -1), torch.zeros(ids.shape)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            last = len(prompt) - 1
            labels[row, last : last + len(answer)] = torch.tensor(answer, dtype=torch.long)
            weights[row, last : last + len(answer)] = 1
            for back in range(1, min(lookahead, len(answer))):
                labels[row, last - back], weights[row, last - back] = answer[back], 1
            if lookahead > 1 and answer:  # an edit pipeline reads the answer from this token's state
                weights[row, last] = 3
        return TextBatch(ids, labels, weights, torch.tensor([len(prompt) for prompt in prompts]))

    def hidden_states(
        self,
        features: Tensor,
        ids: Tensor,
        grid: tuple[int, int],
        edit: bool = False,
        first: int | None = None,
    ) -> Tensor:
        """The language model's states after its final norm.

        Args:
            features: (B, N, D) on `grid`. ids: (B, T), the text after the image.
            edit: whether the text is an instruction in the edit pipelines' template.
            first: None gives the states of the text, (B, T, D); a number gives all states from that token
                on, as edit pipelines read them.
        """
        return self._forward(features, ids, self._prefix(grid, edit), first)[0]

    def cross_entropy(
        self, features: Tensor, texts: TextBatch, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the answers, number of tokens predicted right, and total weight.

        Returns:
            Weighted sums over the batch; divide by the last.
        """
        logits = self.model.lm_head(self.hidden_states(features, texts.ids, grid)).float()
        errors = F.cross_entropy(
            logits.flatten(0, 1), texts.labels.flatten(), ignore_index=-1, reduction="none"
        ).view_as(texts.weights)
        right = (logits.argmax(-1) == texts.labels).float() * texts.weights
        return (errors * texts.weights).sum(), right.sum(), texts.weights.sum()

    @torch.no_grad()
    def generate(
        self, features: Tensor, prompts: Sequence[str], grid: tuple[int, int], max_tokens: int = 24
    ) -> list[str]:
        """Greedy answers to one question about each of several images' features (B, N, D).

        Raises:
            ValueError: prompts of different lengths in tokens; they are not padded.
        """
        prompt_ids = self._token_ids([self.template(prompt)[1] for prompt in prompts])
        end = self._token_ids(["<|im_end|>"])[0][0]
        if len(lengths := sorted(set(map(len, prompt_ids)))) != 1:
            raise ValueError(f"prompts of one batch need the same length in tokens, got {lengths}")
        prefix = self._prefix(grid, False)
        ids = torch.tensor(prompt_ids, device=self.device)
        states, cache = self._forward(features, ids, prefix, None, keep_cache=True)
        position, tokens = len(prefix.ids) + ids.shape[1], []
        for _ in range(max_tokens):
            tokens.append(self.model.lm_head(states[:, -1]).argmax(-1))  # (B,)
            if (torch.stack(tokens) == end).any(0).all():  # every answer has ended
                break
            output = self.decoder(
                inputs_embeds=self.decoder.embed_tokens(tokens[-1][:, None]),
                past_key_values=cache,
                position_ids=prefix.positions[..., position : position + 1].expand(3, len(features), 1),
                use_cache=True,
            )
            states, cache, position = output.last_hidden_state, output.past_key_values, position + 1
        rows = torch.stack(tokens, 1).tolist()
        rows = [row[: row.index(end)] if end in row else row for row in rows]
        return [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def _forward(
        self, features: Tensor, ids: Tensor, prefix: Prefix, first: int | None, keep_cache: bool = False
    ) -> tuple[Tensor, DynamicCache | None]:
        from transformers import DynamicCache

        batch, embed = len(features), self.decoder.embed_tokens
        image_end = embed(prefix.ids[-1:]).expand(batch, -1, -1)
        inputs = torch.cat([features.to(image_end.dtype), image_end, embed(ids)], dim=1)
        if prefix.cache is None:
            template = embed(prefix.ids[: prefix.start]).expand(batch, -1, -1)
            inputs, begin, cache = torch.cat([template, inputs], dim=1), 0, None
        else:
            begin, cache = prefix.start, DynamicCache(config=self.model.config.get_text_config())
            for layer, shared in enumerate(prefix.cache):
                cache.update(*(part.expand(batch, -1, -1, -1) for part in shared), layer)
        output = self.decoder(
            inputs_embeds=inputs,
            past_key_values=cache,
            use_cache=keep_cache or cache is not None,
            position_ids=prefix.positions[..., begin : begin + inputs.shape[1]].expand(3, batch, -1),
        )
        states = output.last_hidden_state
        if first is None:
            return states[:, states.shape[1] - ids.shape[1] :], output.past_key_values
        if prefix.states is not None and begin:
            states = torch.cat([prefix.states.to(states.dtype).expand(batch, -1, -1), states], dim=1)
        return states[:, first:], output.past_key_values

    @torch.no_grad()
    def _prefix(self, grid: tuple[int, int], edit: bool) -> Prefix:
        """The template up to the end of an image, computed once."""
        text = self.template("", edit)[0]
        if (text, grid) in self._prefixes:
            return self._prefixes[text, grid]
        pad, count = "<|image_pad|>", grid[0] * grid[1]
        ids = torch.tensor(self._token_ids([text.replace(pad, pad * count)])[0])
        config = self.model.config
        row = torch.cat([ids, ids.new_zeros(MAX_TEXT)])[None]
        patches = torch.tensor([[1, *(side * config.vision_config.spatial_merge_size for side in grid)]])
        positions, _ = self.model.model.get_rope_index(
            row, mm_token_type_ids=(row == config.image_token_id).int(), image_grid_thw=patches
        )
        start = int((ids == config.image_token_id).nonzero()[0])
        ids, positions = ids.to(self.device), positions.to(self.device)
        cache = states = None
        if self.caches_prefix:
            output = self.decoder(
                inputs_embeds=self.decoder.embed_tokens(ids[None, :start]),
                use_cache=True,
                position_ids=positions[..., :start],
            )
            cache = [(layer.keys.clone(), layer.values.clone()) for layer in output.past_key_values.layers]
            states = output.last_hidden_state
        self._prefixes[text, grid] = Prefix(ids, start, positions, cache, states)
        return self._prefixes[text, grid]

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
