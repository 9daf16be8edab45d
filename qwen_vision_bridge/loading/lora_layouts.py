"""LoRA files of any trainer in one canonical form: which module gets which matrices, at which scale.

Trainers name the same layer in their own way (`transformer.X`, `diffusion_model.X`, `lora_unet_X`, …), and a
loader that guesses drops what it does not know. Here every key of a file is matched against the names of the
model's own modules, and a key that matches none is an error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up"
    r"|lora_mid|lora_magnitude_vector|dora_scale|alpha|diff_b|diff|b_norm|w_norm"
    r"|lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b|lokr_t2"
    r"|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|hada_t1|hada_t2)"
    r"(\.(?!weight$|bias$)(?P<adapter>[\w-]+))?(\.(?P<tensor>weight|bias))?"
)
SYNONYMS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
PREFIXES = (
    "base_model_model_",
    "model_",
    "diffusion_model_",
    "transformer_",
    "pipe_",
    "dit_",
    "unet_",
    "lora_",
    "lycoris_",
    "text_encoders_",
    "text_encoder_",
    "qwen25_7b_",
    "te_",
    "te1_",
)
"""What trainers put before a module's name, dots as underscores; several may follow each other."""
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?[._]|lora_te\d?_|te\.)")
ORIGINAL_NAMES = (  # diffusers' name of a module → its name in the released checkpoint
    (r"^blocks\.(\d+)\.attn1\.to_out\.0$", r"blocks.\1.self_attn.o"),
    (r"^blocks\.(\d+)\.attn1\.(?:to_)?(q|k|v|norm_q|norm_k)$", r"blocks.\1.self_attn.\2"),
    (r"^blocks\.(\d+)\.attn2\.to_out\.0$", r"blocks.\1.cross_attn.o"),
    (r"^blocks\.(\d+)\.attn2\.add_(k|v)_proj$", r"blocks.\1.cross_attn.\2_img"),
    (r"^blocks\.(\d+)\.attn2\.norm_added_k$", r"blocks.\1.cross_attn.norm_k_img"),
    (r"^blocks\.(\d+)\.attn2\.(?:to_)?(q|k|v|norm_q|norm_k)$", r"blocks.\1.cross_attn.\2"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj$", r"blocks.\1.ffn.0"),
    (r"^blocks\.(\d+)\.ffn\.net\.2$", r"blocks.\1.ffn.2"),
    (r"^blocks\.(\d+)\.norm2$", r"blocks.\1.norm3"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
)
"""Wan's transformer (Wan-Video/Wan2.1, `wan/modules/model.py`) and Qwen2.5-VL before transformers 4.52."""
MAX_RANK = 512  # a LoRA above it takes more memory than the layers it changes


@dataclass
class LoraTensors:
    """A LoRA in canonical form, by the model's own module and parameter names."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A (r, in) and B (out, r) of each changed layer."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Each layer's alpha: its update is alpha / r · B A."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """DoRA's length of each row of the changed weight, (out,)."""
    additions: dict[str, Tensor] = field(default_factory=dict)
    """Differences of norms and biases, by the parameter's name."""

    @property
    def names(self) -> list[str]:
        """Every layer and parameter that it changes."""
        return [*self.pairs, *self.additions]

    def check(self) -> None:
        """Refuse a LoRA that cannot have been trained.

        Raises:
            ValueError: NaN or infinity, or nothing but zeros where its updates come from.
        """
        changes = [*(b for _, b in self.pairs.values()), *self.additions.values()]
        tensors = [*(a for a, _ in self.pairs.values()), *changes]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("it holds NaN or infinity: download it again, or train it anew")
        if not any(tensor.any() for tensor in changes):
            raise ValueError("its B matrices are all zero: it was never trained")

    def peft_config(self) -> dict[str, Any]:
        """The arguments of peft's `LoraConfig`, every layer with its own rank and alpha.

        Only what differs from the usual value is a pattern: peft tries every pattern on every layer.
        """
        ranks = {f"^{re.escape(module)}": a.shape[0] for module, (a, _) in self.pairs.items()}
        alphas = {f"^{re.escape(module)}": alpha for module, alpha in self.alphas.items()}
        (rank, _), *_ = Counter(ranks.values()).most_common(1)
        (alpha, _), *_ = Counter(alphas.values()).most_common(1)
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            "target_modules": list(self.pairs),
            "use_dora": bool(self.magnitudes),
        }


def canonical(tensors: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any]) -> LoraTensors:
    """Match every tensor of a LoRA file with a module of the model.

    Args:
        tensors: the file's, by key.
        config: peft's, where the file has one: its `lora_alpha` and patterns hold where no `.alpha` does.

    Raises:
        ValueError: keys that match nothing, half a pair, another shape, a kind that cannot be exact.
    """
    index = _module_index(model)
    groups: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        module = None if match is None else _find(match["module"], index)
        if match is None or module is None:
            unmatched.append(key)
            continue
        kind = SYNONYMS.get(match["kind"], match["kind"])
        kind = f"{kind}_bias" if match["tensor"] == "bias" else kind
        if kind in groups.setdefault(module, {}):
            raise ValueError(f"two tensors are the {kind} of {module}: one of them is {key}")
        groups[module][kind] = tensor
    if unmatched:
        some = ", ".join(sorted(unmatched)[:3])
        raise ValueError(
            f"{len(unmatched)} of {len(tensors)} keys match no layer of {type(model).__name__} "
            f"({some}{', …' if len(unmatched) > 3 else ''}): it was trained for another model or is of "
            "an unknown kind"
        )
    lora = LoraTensors()
    for module, group in groups.items():
        try:
            _convert(lora, module, dict(group), _layer(model, module), config)
        except (RuntimeError, IndexError) as error:  # torch's, of matrices that cannot be multiplied
            sizes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in group.items())
            raise ValueError(f"{module}: its tensors do not fit together ({sizes})") from error
    return lora


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the transformer and those of the text encoder."""
    of_encoder = {key: tensor for key, tensor in tensors.items() if TEXT_ENCODER.match(key)}
    return {key: tensor for key, tensor in tensors.items() if key not in of_encoder}, of_encoder


def module_name(name: str) -> str:
    """A module's name as it was before adapters wrapped it."""
    return name.replace(".base_layer", "")


def _layer(model: nn.Module, name: str) -> nn.Module:
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _module_index(model: nn.Module) -> dict[str, str | None]:
    """Modules with weights by every name they go by, dots as underscores; None where two share one."""
    index: dict[str, str | None] = {}
    for wrapped, module in model.named_modules():
        if "lora_" in wrapped or not (module._parameters or hasattr(module, "base_layer")):
            continue
        name = module_name(wrapped)
        names = {name, *(re.sub(pattern, other, name) for pattern, other in ORIGINAL_NAMES)}
        for each in names:
            flat = each.replace(".", "_")
            index[flat] = name if index.get(flat, name) == name else None
    return index


def _find(name: str, index: Mapping[str, str | None]) -> str | None:
    """The module that a file's name means: the name itself, or what is left of it without known prefixes."""
    flat = name.replace(".", "_")
    if flat in index:
        return index[flat]
    rests = (flat.removeprefix(prefix) for prefix in PREFIXES if flat.startswith(prefix))
    return next((found for rest in rests if (found := _find(rest, index)) is not None), None)


def _convert(
    lora: LoraTensors, module: str, group: dict[str, Tensor], layer: nn.Module, config: Mapping[str, Any]
) -> None:
    """Add the tensors of one module to the LoRA."""
    alpha = group.pop("alpha", None)
    stated = None if alpha is None else float(alpha.float())
    if "diff_b" in group or "up_bias" in group:
        _add(lora, module, "bias", layer, group.pop("diff_b", None), 1.0)
    if "diff" in group:
        difference = group.pop("diff")
        if getattr(layer, "weight", difference).ndim < 2:
            _add(lora, module, "weight", layer, difference, 1.0)
        else:
            group["down"], group["up"] = _factors(difference)[::-1]
            stated = None
    if not group:
        return
    a, b, alpha_of = _pair(module, group, stated, config)
    if (bias := group.pop("up_bias", None)) is not None:
        _add(lora, module, "bias", layer, bias, alpha_of / a.shape[0])
    if (magnitude := group.pop("magnitude", None)) is not None:
        if magnitude.numel() != b.shape[0]:
            raise ValueError(f"{module}: DoRA along the inputs (dora_scale {tuple(magnitude.shape)})")
        lora.magnitudes[module] = magnitude.flatten()
    if group:
        raise ValueError(f"{module}: cannot apply {', '.join(sorted(group))} exactly")
    _check_shapes(module, a, b, layer)
    lora.pairs[module], lora.alphas[module] = (a, b), alpha_of


def _add(
    lora: LoraTensors, module: str, tensor: str, layer: nn.Module, difference: Tensor | None, scale: float
) -> None:
    """Add a difference of a norm's weight or a layer's bias."""
    if difference is None:
        return
    parameter = getattr(layer, tensor, None)
    if parameter is None or parameter.shape != difference.shape:
        has = "none" if parameter is None else tuple(parameter.shape)
        raise ValueError(f"{module}: a difference {tuple(difference.shape)} of its {tensor}, which is {has}")
    lora.additions[f"{module}.{tensor}"] = difference.float() * scale


def _pair(
    module: str, group: dict[str, Tensor], alpha: float | None, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of a layer; its tensors are taken out of the group."""
    if any(kind.startswith("lokr") for kind in group):
        a, b, scale = _lokr(module, group, alpha)
    elif any(kind.startswith("hada") for kind in group):
        a, b, scale = _loha(module, group, alpha)
    elif "lora_mid" in group:
        raise ValueError(f"{module}: a LoRA with a middle matrix (LoCon's Tucker form)")
    elif {"down", "up"} <= set(group):
        a, b = group.pop("down"), group.pop("up")
        scale = _stated_scale(module, alpha, a.shape[0], config)
    else:
        raise ValueError(f"{module} has {', '.join(sorted(group))} alone: the file is incomplete")
    if a.shape[0] > MAX_RANK:
        raise ValueError(
            f"{module}: its update has rank {a.shape[0]} as a LoRA, at most {MAX_RANK} are sensible: merge "
            "the file into the model's weights"
        )
    return a, b, scale * a.shape[0]


def _stated_scale(module: str, alpha: float | None, rank: int, config: Mapping[str, Any]) -> float:
    """The scale of B A: by the file's alpha, else by peft's config, else 1."""
    if alpha is None and "lora_alpha" in config:
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        found = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(found, config["lora_alpha"]))
        if config.get("use_rslora"):  # Kalajdzievski 2023, arXiv 2312.03732
            return alpha / math.sqrt(rank)
    return 1.0 if alpha is None else alpha / rank


def _lokr(module: str, group: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor, float]:
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): w1 ⊗ w2 = (l1 ⊗ l2) (r1 ⊗ r2) for w = l r."""
    if "lokr_t2" in group:
        raise ValueError(f"{module}: a LoKr of a convolution")
    lefts, rights, rank = [], [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in group:
            left, right = _factors(group.pop(name).float())
        elif {f"{name}_a", f"{name}_b"} <= set(group):
            left, right = group.pop(f"{name}_a").float(), group.pop(f"{name}_b").float()
            rank = right.shape[0]
        else:
            raise ValueError(f"{module}: a LoKr without {name}: the file is incomplete")
        lefts.append(left)
        rights.append(right)
    scale = 1.0 if alpha is None or rank is None else alpha / rank  # both whole: LyCORIS ignores alpha
    return torch.kron(rights[0], rights[1]), torch.kron(lefts[0], lefts[1]), scale


def _loha(module: str, group: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor, float]:
    """LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098): (a1 b1) ⊙ (a2 b2) has rank r² at most."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if "hada_t1" in group or not set(names) <= set(group):
        raise ValueError(f"{module}: a LoHa of a convolution, or without one of {', '.join(names)}")
    a1, b1, a2, b2 = (group.pop(name).float() for name in names)
    rank = b1.shape[0]
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r²)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r², in)
    return down, up, 1.0 if alpha is None else alpha / rank


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A left and a right matrix whose product is the given one, over its smaller side."""
    if matrix.ndim != 2:
        raise ValueError(f"a difference of a layer with weights {tuple(matrix.shape)}, no matrix")
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)


def _check_shapes(module: str, a: Tensor, b: Tensor, layer: nn.Module) -> None:
    """Refuse matrices of other sizes than the layer states; quantised weights have shapes of their own."""
    sizes = tuple(getattr(layer, name, None) for name in ("in_features", "out_features"))
    if None in sizes:
        sizes = tuple(getattr(layer, name, None) for name in ("in_channels", "out_channels"))
    if a.shape[0] != b.shape[1] or (a.shape[1], b.shape[0]) != sizes:
        raise ValueError(
            f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a layer from {sizes[0]} to "
            f"{sizes[1]}: it was trained for another model"
        )
