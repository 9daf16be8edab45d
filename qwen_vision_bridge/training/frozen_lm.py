"""The frozen target's language model over vision features given by hand: what it answers, and how wrong.

The stock modules are used as they are, through `inputs_embeds`; gradients reach the features and stop at the
weights. All texts of a batch follow images on one grid, so what comes before the first image, the
template, is the same in every batch: its keys and values are worked out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..specs import Family

ROOM = 512  # tokens after the image that positions are worked out for
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE_PREFIX_TOKENS = 64  # what the edit pipelines cut off the front of every prompt
TEMPLATE_PREFIX = (  # the edit pipelines' template up to the images
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n"
)
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
AHEAD = 5  # tokens of the template's end that the miniature was taught the answer's first tokens in


class Rows(NamedTuple):
    """Texts behind an image as tokens, padded on the right to one length."""

    ids: Tensor
    """(n, T), prompt and reply."""
    labels: Tensor
    """(n, T): the token to predict at each place, -1 for none."""
    weights: Tensor
    """(n, T): how much each counts."""
    lengths: Tensor
    """(n,): tokens up to the reply."""

    def at(self, index: Tensor | slice) -> Rows:
        """Some of the texts."""
        return Rows(*(part[index] for part in self))

    def shortened(self, least: int = 1) -> Rows:
        """Without the padding that none of the texts needs; at least so many tokens stay."""
        used = (self.labels >= 0).any(0).nonzero()
        longest = max(int(self.lengths.max()), int(used[-1]) + 2 if len(used) else 0, least)
        return Rows(*(part[:, :longest] for part in self[:3]), self.lengths)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(*(part.to(device, non_blocking=True) for part in self))


@dataclass(frozen=True)
class Opening:
    """Everything up to the end of an image on one grid, which all texts share."""

    ids: Tensor
    """(P,)"""
    start: int
    """Place of the first image token; the last is P − 2, behind it ends the image."""
    positions: Tensor
    """(3, 1, P + ROOM)"""
    past: list[tuple[Tensor, Tensor]] | None
    """Keys and values of the tokens before the image, each (1, H, start, D), a pair a layer."""
    states: Tensor | None
    """(1, start, D): their last states. Both are None where they are worked out in every batch."""


class Reader:
    """A frozen Qwen2.5-VL that is asked about features.

    Args:
        model: the stock model, or an edit pipeline's text encoder.
        processor: the stock processor.
        family: decides the template: the miniature answers in the edit pipelines', in which it was taught,
            others in their chat template.
        checkpointing: trade time for memory in the layers; the template is then not worked out ahead.
        learning: whether weights of the model learn, as a rival's do: nothing is then worked out ahead.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        family: Family,
        checkpointing: bool = False,
        learning: bool = False,
    ) -> None:
        self.model, self.processor, self.family = model.eval(), processor, family
        if not learning:
            model.requires_grad_(False)
        self.language = model.model.language_model
        self.device = self.language.embed_tokens.weight.device
        self.shares = not (checkpointing or learning)
        if checkpointing:  # acts in training mode only; these models have no dropout that is on
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self.language.train()
        self._openings: dict[tuple[str, tuple[int, int]], Opening] = {}

    @property
    def ahead(self) -> int:
        """How many of the prompt's last tokens learn the reply."""
        return AHEAD if self.family.name == "miniature" else 1

    def template(self, prompt: str, edit: bool = False) -> tuple[str, str]:
        """A prompt in its template: up to the end of the image, and from there to the reply."""
        if edit or self.family.name == "miniature":
            named = "" if self.family.editor.pipeline_class == "QwenImageEditPipeline" else "Picture 1: "
            return f"{TEMPLATE_PREFIX}{named}{IMAGE}", prompt + CLOSING
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, end, after = text.partition("<|vision_end|>")
        return before + end, after

    def rows(self, texts: Sequence[tuple[str, str | None]], edit: bool = False) -> Rows:
        """Prompts and replies as tokens.

        Raises:
            ValueError: a text that is longer than positions are made for.
        """
        asked = self._ids([self.template(prompt, edit)[1] for prompt, _ in texts])
        end = self._ids(["<|im_end|>"])[0]
        said = self._ids([answer or "" for _, answer in texts])
        said = [[*ids, *end] if texts[i][1] is not None else [] for i, ids in enumerate(said)]
        longest = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
        if longest > ROOM:
            raise ValueError(f"a prompt and its reply are {longest} tokens long, there is room for {ROOM}")
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        labels, weights = torch.full_like(ids, -1), torch.zeros(ids.shape)
        for row, (before, after) in enumerate(zip(asked, said, strict=True)):
            ids[row, : len(before) + len(after)] = torch.tensor([*before, *after])
            last = len(before) - 1
            labels[row, last : last + len(after)] = torch.tensor(after, dtype=torch.long)
            weights[row, last : last + len(after)] = 1
            for back in range(1, min(self.ahead, len(after))):
                labels[row, last - back], weights[row, last - back] = after[back], 1
            if self.ahead > 1 and after:  # what an edit pipeline reads of the reply hangs on its first token
                weights[row, last] = 3
        return Rows(ids, labels, weights, torch.tensor([len(before) for before in asked]))

    def states(
        self, features: Tensor, ids: Tensor, grid: tuple[int, int], edit: bool = False, cut: int | None = None
    ) -> Tensor:
        """The language model's states after its final norm.

        Args:
            features: (B, N, D) on `grid`. ids: (B, T), the text behind the image.
            edit: whether the text is an instruction in the edit pipelines' template.
            cut: None gives the states of the text, (B, T, D); a number those of everything from that token
                on, as edit pipelines read them.
        """
        opening = self._opening(grid, edit)
        return self._forward(features, ids, opening, cut)[0]

    def cross_entropy(
        self, features: Tensor, rows: Rows, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the replies, how many tokens are predicted right, and all weight.

        Returns:
            Weighted sums over the batch; divide by the last.
        """
        logits = self.model.lm_head(self.states(features, rows.ids, grid)).float()
        errors = F.cross_entropy(
            logits.flatten(0, 1), rows.labels.flatten(), ignore_index=-1, reduction="none"
        ).view_as(rows.weights)
        right = (logits.argmax(-1) == rows.labels).float() * rows.weights
        return (errors * rows.weights).sum(), right.sum(), rows.weights.sum()

    @torch.no_grad()
    def misses(self, features: Tensor, rows: Rows, grid: tuple[int, int]) -> Tensor:
        """Whether any token of a reply is predicted wrong, (B,)."""
        predicted = self.model.lm_head(self.states(features, rows.ids, grid)).argmax(-1)
        return ((predicted != rows.labels) & (rows.labels >= 0)).any(1)

    @torch.no_grad()
    def reply(
        self, features: Tensor, prompts: Sequence[str], grid: tuple[int, int], most: int = 24
    ) -> list[str]:
        """Greedy replies to a question about each of several images' features (B, N, D).

        Raises:
            ValueError: prompts of different lengths in tokens, which are not padded here.
        """
        asked = self._ids([self.template(prompt)[1] for prompt in prompts])
        end = self._ids(["<|im_end|>"])[0][0]
        if len(set(map(len, asked))) != 1:
            raise ValueError(f"questions asked together are equally long, got {sorted(set(map(len, asked)))}")
        opening = self._opening(grid, False)
        ids = torch.tensor(asked, device=self.device)
        states, past = self._forward(features, ids, opening, None, keep=True)
        place, said = len(opening.ids) + ids.shape[1], []
        for _ in range(most):
            said.append(self.model.lm_head(states[:, -1]).argmax(-1))  # (B,)
            if (torch.stack(said) == end).any(0).all():  # every reply has ended
                break
            output = self.language(
                inputs_embeds=self.language.embed_tokens(said[-1][:, None]),
                past_key_values=past,
                position_ids=opening.positions[..., place : place + 1].expand(3, len(features), 1),
                use_cache=True,
            )
            states, past, place = output.last_hidden_state, output.past_key_values, place + 1
        rows = torch.stack(said, 1).tolist()
        kept = [row[: row.index(end)] if end in row else row for row in rows]
        return [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]

    def _forward(
        self, features: Tensor, ids: Tensor, opening: Opening, cut: int | None, keep: bool = False
    ) -> tuple[Tensor, Any]:
        batch, start = len(features), opening.start
        embed = self.language.embed_tokens
        end = embed(opening.ids[-1:]).expand(batch, -1, -1)
        inputs = torch.cat([features.to(end.dtype), end, embed(ids)], dim=1)
        past = None
        if opening.past is None:
            first = embed(opening.ids[:start]).expand(batch, -1, -1)
            inputs, begin = torch.cat([first, inputs], dim=1), 0
        else:
            past, begin = _cache(self.model.config, opening.past, batch), start
        stop = begin + inputs.shape[1]
        output = self.language(
            inputs_embeds=inputs,
            past_key_values=past,
            use_cache=keep or past is not None,
            position_ids=opening.positions[..., begin:stop].expand(3, batch, -1),
        )
        states = output.last_hidden_state
        if cut is None:
            return states[:, states.shape[1] - ids.shape[1] :], output.past_key_values
        if begin:
            states = torch.cat([opening.states.to(states.dtype).expand(batch, -1, -1), states], dim=1)
        return states[:, cut:], output.past_key_values

    @torch.no_grad()
    def _opening(self, grid: tuple[int, int], edit: bool) -> Opening:
        text = self.template("", edit)[0]
        if (text, grid) in self._openings:
            return self._openings[text, grid]
        pad, count = "<|image_pad|>", grid[0] * grid[1]
        ids = torch.tensor(self._ids([text.replace(pad, pad * count)])[0])
        config = self.model.config
        row = torch.cat([ids, ids.new_zeros(ROOM)])[None]
        shapes = torch.tensor([[1, *(side * config.vision_config.spatial_merge_size for side in grid)]])
        positions, _ = self.model.model.get_rope_index(
            row, mm_token_type_ids=(row == config.image_token_id).int(), image_grid_thw=shapes
        )
        start = int((ids == config.image_token_id).nonzero()[0])
        ids, positions = ids.to(self.device), positions.to(self.device)
        past, states = None, None
        if self.shares:
            first = self.language.embed_tokens(ids[None, :start])
            output = self.language(inputs_embeds=first, use_cache=True, position_ids=positions[..., :start])
            past = [(layer.keys.clone(), layer.values.clone()) for layer in output.past_key_values.layers]
            states = output.last_hidden_state
        opening = Opening(ids, start, positions, past, states)
        self._openings[text, grid] = opening
        return opening

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _cache(config: Any, past: list[tuple[Tensor, Tensor]], batch: int) -> Any:
    """A fresh cache that begins with keys and values shared by the whole batch."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config.get_text_config())
    for layer, (keys, values) in enumerate(past):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache
