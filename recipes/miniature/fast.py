"""Fast forward passes of the stock vision-language models for batches of equal layout.

Stock code handles images of any size on one packed axis, with index arithmetic and synchronisation in
every call. In training all grids and positions are equal: they are computed once with the stock code, and
the stock modules run batched, which CUDA graphs can replay. `tests/recipes/test_miniature.py` proves that
both give the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .build import SOURCE_VISION, TARGET_VISION
from .data import opening

GRID = 8  # merged tokens a side


def to_patches(images: Tensor, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels as the stock image processors flatten them.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, S, 2·3·patch²) in merge order: the four patches of a token are neighbours.
    """
    batch, height, width, _ = images.shape
    x = (images.float() / 255 - mean) / std  # (B, H, W, 3)
    rows, columns = height // (2 * patch), width // (2 * patch)
    x = x.permute(0, 3, 1, 2).reshape(batch, 3, rows, 2, patch, columns, 2, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, rows, columns, 2, 2, 3, p, p)
    x = x[..., None, :, :].expand(*x.shape[:-2], 2, patch, patch)  # the still image twice in time
    return x.reshape(batch, rows * columns * 4, -1)


class FastModel(nn.Module):
    """A miniature vision-language model over batches that all show `shown` images of the same size.

    Parameters are the stock model's own: training this trains that.
    """

    def __init__(self, model: nn.Module, image_processor: Any) -> None:
        super().__init__()
        self.model = model
        self.visual, self.language = model.model.visual, model.model.language_model
        self.is_source = model.config.model_type == "qwen3_vl"
        self.patch = self.visual.config.patch_size
        self._block = self._tower_block
        self._starts: dict[int, list[int]] = {}  # images shown → where the tokens of each begin
        for name in ("mean", "std"):
            values = torch.tensor(getattr(image_processor, f"image_{name}"))
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        cos, sin = _tower_rotations(self.visual, self.patch)
        for name, value in (("cos", cos), ("sin", sin)):
            self.register_buffer(f"tower_{name}", value, persistent=False)
        for shown in (1, 2):
            ids = torch.tensor(opening(shown)[0])
            self.register_buffer(f"opening_{shown}", ids, persistent=False)
            pads = (ids == model.config.image_token_id).nonzero()[:, 0].view(shown, GRID * GRID)
            self._starts[shown] = pads[:, 0].tolist()
            positions = _positions(model, ids, shown)
            self.register_buffer(f"positions_{shown}", positions, persistent=False)

    def compile_blocks(self, on: bool) -> None:
        """Turn torch.compile of the repeated parts on or off; parts of a kind share one compilation."""
        block = self._tower_block
        self._block = torch.compile(block, dynamic=False, fullgraph=True) if on else block
        compile_modules(self.language.layers, on)

    def vision(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Merged features (B, 64, D) in image order and DeepStack features, for uint8 (B, H, W, 3)."""
        patches = to_patches(images, self.patch, self.pixel_mean, self.pixel_std)
        batch, length, _ = patches.shape
        embed = self.visual.patch_embed.proj  # a convolution whose stride is its kernel: a linear map
        x = F.linear(patches, embed.weight.flatten(1), embed.bias)
        if self.is_source:
            places = self.visual.pos_embed.weight.view(1, GRID, 2, GRID, 2, -1)  # merge order, from rows
            x = x + places.transpose(2, 3).reshape(1, length, -1)
        else:
            x = _to_windows(x)
        taps = []
        for index, block in enumerate(self.visual.blocks):
            windows = 1 if self.is_source or index in TARGET_VISION["fullatt_block_indexes"] else 4
            x = self._block(block, x, windows)
            if self.is_source and index in SOURCE_VISION["deepstack_visual_indexes"]:
                tap = self.visual.deepstack_merger_list[len(taps)]
                taps.append(tap(x.reshape(batch * length, -1)).view(batch, GRID * GRID, -1))
        merged = self.visual.merger(x.reshape(batch * length, -1)).view(batch, GRID * GRID, -1)
        return (merged if self.is_source else _from_windows(merged)), taps

    def _tower_block(self, block: nn.Module, x: Tensor, windows: int) -> Tensor:
        x = x + self._attend(block.attn, block.norm1(x), windows)
        return x + block.mlp(block.norm2(x))

    def _attend(self, attention: nn.Module, x: Tensor, windows: int) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1).unbind(2)
        cos, sin = self.tower_cos[:, None], self.tower_sin[:, None]  # (S, 1, D)
        q, k = (_rotate(part.float(), cos, sin).to(v.dtype) for part in (q, k))
        shape = (batch * windows, length // windows, attention.num_heads, -1)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def embed(self, images: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Input embeddings (B, L, D), DeepStack features laid out alike, and positions (3, 1, L).

        Args:
            images: (B, shown, H, W, 3) uint8.
            text: (B, T) ids from the prompt on.
        """
        batch, shown = images.shape[:2]
        features, taps = self.vision(images.flatten(0, 1))
        ids = getattr(self, f"opening_{shown}")
        start = self.language.embed_tokens(ids).to(features.dtype).expand(batch, -1, -1)
        inputs = torch.cat([start, self.language.embed_tokens(text).to(features.dtype)], dim=1)
        inputs = self._insert(inputs, features, shown)
        laid = [self._insert(torch.zeros_like(inputs), tap, shown) for tap in taps]
        return inputs, laid, getattr(self, f"positions_{shown}")[..., : inputs.shape[1]]

    def _insert(self, base: Tensor, features: Tensor, shown: int) -> Tensor:
        """`base` (B, L, D) with the images' features (B·shown, 64, D) at the positions of their tokens."""
        features = features.reshape(len(base), shown * GRID * GRID, -1)
        parts, place = [], 0
        for image, start in zip(features.chunk(shown, 1), self._starts[shown], strict=True):
            parts += [base[:, place:start], image]
            place = start + GRID * GRID
        return torch.cat([*parts, base[:, place:]], dim=1)

    def hidden(self, images: Tensor, text: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, L, D): the opening first, then the text."""
        x, laid, positions = self.embed(images, text)
        rotations = self.language.rotary_emb(x, positions)
        for index, layer in enumerate(self.language.layers):
            x = layer(x, attention_mask=None, position_embeddings=rotations)
            x = x[0] if isinstance(x, tuple) else x
            if index < len(laid):
                x = x + laid[index]
        return self.language.norm(x)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits at the positions of the text, (B, T, V)."""
        states = self.hidden(images, text)[:, -text.shape[1] :]
        return F.linear(states, self.language.embed_tokens.weight)


def compile_modules(modules: Iterable[nn.Module], on: bool) -> None:
    """Turn torch.compile of modules of one kind on or off, in place."""
    for module in modules:
        if on:
            module.compile(dynamic=False, fullgraph=True)
        else:
            module._compiled_call_impl = None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _to_windows(x: Tensor) -> Tensor:
    """Patches (B, 256, D) of an 8 × 8 grid of tokens, window by window of 4 × 4 tokens.

    A view and no index: the gradient of an index is slow to gather on a GPU.
    """
    return x.view(len(x), 2, 4, 2, 4, 4, -1).transpose(2, 3).reshape(x.shape)


def _from_windows(x: Tensor) -> Tensor:
    """The inverse, of merged tokens (B, 64, D)."""
    return x.view(len(x), 2, 2, 4, 4, -1).transpose(2, 3).reshape(x.shape)


class _Reached(Exception):  # noqa: N818  (no error: it ends a forward pass at the first block)
    pass


def _tower_rotations(visual: nn.Module, patch: int) -> tuple[Tensor, Tensor]:
    """cos and sin (S, head) that the stock tower gives its blocks for one image, in its blocks' order."""
    arguments: dict[str, Any] = {}

    def take(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.update(kwargs)
        raise _Reached

    handle = visual.blocks[0].register_forward_pre_hook(take, with_kwargs=True)
    weight = visual.patch_embed.proj.weight
    patches = torch.zeros(4 * GRID * GRID, weight[0].numel(), device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            visual(patches, grid_thw=torch.tensor([[1, 2 * GRID, 2 * GRID]]))
    except _Reached:
        cos, sin = arguments["position_embeddings"]
        return cos.float(), sin.float()
    finally:
        handle.remove()
    raise RuntimeError(f"{type(visual).__name__} never reached its blocks")


def _positions(model: nn.Module, ids: Tensor, shown: int) -> Tensor:
    """Positions (3, 1, L) of the opening and 80 tokens more, by the stock rule."""
    row = torch.cat([ids, ids.new_full((80,), 220)])[None]
    grids = torch.tensor([[1, 2 * GRID, 2 * GRID]] * shown)
    types = (row == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(row, mm_token_type_ids=types, image_grid_thw=grids)
    return positions


def build(role: str, seed: int, folder: str | None = None) -> FastModel:
    """The source or target, random from a seed or from a stock folder, on the CPU in fp32.

    Patch embeddings of another size are resized.
    """
    import transformers

    from . import build as miniature

    processor = miniature.source_processor() if role == "source" else miniature.target_processor()
    kind = "Qwen3VL" if role == "source" else "Qwen2_5_VL"
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    vision, text = (getattr(miniature, f"{role.upper()}_{part}") for part in ("VISION", "TEXT"))
    config = miniature.vision_language_config(getattr(transformers, f"{kind}Config"), vision, text)
    if folder:
        model = model_class.from_pretrained(folder, dtype=torch.float32)
        if model.config.vision_config.patch_size != vision["patch_size"]:
            model = _with_resized_patches(model, model_class(config).float())
    else:
        model = miniature.randomise(model_class(config).float(), seed)
        with torch.no_grad():  # also the output layer: logits of size 1 to begin with
            model.model.language_model.embed_tokens.weight.mul_(0.1)
            if role == "source":  # position embeddings of full size would drown the patches
                model.model.visual.pos_embed.weight.mul_(0.1)
    return FastModel(model, processor.image_processor)


def _with_resized_patches(model: nn.Module, other: nn.Module) -> nn.Module:
    """`other` with the weights of `model`; the patch embedding is resized and keeps its sum."""
    weights = model.state_dict()
    name = "model.visual.patch_embed.proj.weight"
    old, side = weights[name], other.state_dict()[name].shape[-1]
    resized = F.interpolate(old.flatten(0, 1), (side, side), mode="bilinear", antialias=True)
    weights[name] = resized.view(*old.shape[:3], side, side) * (old.shape[-1] / side) ** 2
    other.load_state_dict(weights)
    return other.eval()
