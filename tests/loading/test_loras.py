"""LoRA files of every layout act as weights merged by hand do, or are refused in one line."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_vision_bridge.loading.lora_files import find_lora, parse_lora
from qwen_vision_bridge.loading.loras import LoraSet
from qwen_vision_bridge.loading.memory import MEMORY_MODES, MemoryMode

RANKS = {"attn.q": 4, "attn.out": 3, "mlp.in": 5}
ALPHA = 2.0
LAYERS = {  # by family: diffusers' names, and the released checkpoint's where those differ
    "qwen": {
        "attn.q": ("transformer_blocks.0.attn.to_q",) * 2,
        "attn.out": ("transformer_blocks.1.attn.to_out.0",) * 2,
        "mlp.in": ("transformer_blocks.0.img_mlp.net.0.proj",) * 2,
    },
    "wan": {
        "attn.q": ("blocks.0.attn1.to_q", "blocks.0.self_attn.q"),
        "attn.out": ("blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o"),
        "mlp.in": ("blocks.0.ffn.net.0.proj", "blocks.0.ffn.0"),
    },
}
PEFT, KOHYA, OLD, OLDEST = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
LAYOUTS = {  # prefix, flattened, released names, the two matrices
    "bare peft": ("", False, False, PEFT),
    "bare kohya, as Lightning": ("", False, False, KOHYA),
    "bare default, as DiffSynth": ("", False, False, DEFAULT),
    "bare original peft": ("", False, True, PEFT),
    "bare original default": ("", False, True, DEFAULT),
    "transformer peft": ("transformer.", False, False, PEFT),
    "transformer kohya": ("transformer.", False, False, KOHYA),
    "transformer old": ("transformer.", False, False, OLD),
    "transformer oldest": ("transformer.", False, False, OLDEST),
    "transformer default": ("transformer.", False, False, DEFAULT),
    "diffusion_model peft": ("diffusion_model.", False, True, PEFT),
    "diffusion_model kohya": ("diffusion_model.", False, True, KOHYA),
    "diffusion_model default": ("diffusion_model.", False, True, DEFAULT),
    "diffusion_model diffusers": ("diffusion_model.", False, False, PEFT),
    "model.diffusion_model peft": ("model.diffusion_model.", False, True, PEFT),
    "model.diffusion_model kohya": ("model.diffusion_model.", False, True, KOHYA),
    "base_model peft": ("base_model.model.", False, False, PEFT),
    "base_model default": ("base_model.model.", False, False, DEFAULT),
    "base_model original": ("base_model.model.", False, True, PEFT),
    "base_model transformer": ("base_model.model.transformer.", False, False, PEFT),
    "lora_unet kohya": ("lora_unet_", True, True, KOHYA),
    "lora_unet peft": ("lora_unet_", True, True, PEFT),
    "lora_unet diffusers": ("lora_unet_", True, False, KOHYA),
    "lora_transformer kohya": ("lora_transformer_", True, False, KOHYA),
    "lora_transformer peft": ("lora_transformer_", True, False, PEFT),
    "lycoris kohya": ("lycoris_", True, False, KOHYA),
    "lycoris original": ("lycoris_", True, True, KOHYA),
    "pipe.dit default": ("pipe.dit.", False, False, DEFAULT),
    "pipe.dit original": ("pipe.dit.", False, True, DEFAULT),
    "pipe.dit peft": ("pipe.dit.", False, False, PEFT),
    "dit peft": ("dit.", False, False, PEFT),
    "unet peft": ("unet.", False, False, PEFT),
    "model peft": ("model.", False, True, PEFT),
}


class Pipe(SimpleNamespace):
    """What `LoraSet` needs of a diffusers pipeline."""

    hf_device_map = None
    _execution_device = torch.device("cpu")

    @property
    def components(self) -> dict[str, Any]:
        return vars(self)

    def maybe_free_model_hooks(self) -> None:
        """Nothing is offloaded."""


def _random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stock() -> dict[str, nn.Module]:
    """A small random transformer of each family."""
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    qwen = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
    )
    wan = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    return {"qwen": _random(qwen), "wan": _random(wan)}


@pytest.fixture(scope="module")
def untouched(stock: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies that no LoRA is ever loaded on."""
    return copy.deepcopy(stock)


@pytest.fixture(params=["qwen", "wan"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loras(stock: dict[str, nn.Module], family: str) -> Iterator[LoraSet]:
    """The LoRAs of a family's stock transformer, which is stock again afterwards."""
    found = LoraSet(Pipe(transformer=stock[family], text_encoder=None))
    yield found
    found.unload(list(found.weights()))
    assert not hasattr(stock[family], "peft_config")


def _matrices(model: nn.Module, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer that the files change, by its role."""
    generator = torch.Generator().manual_seed(2)
    pairs = {}
    for role, rank in RANKS.items():
        layer = model.get_submodule(LAYERS[family][role][0])
        a = torch.randn(rank, layer.in_features, generator=generator)
        pairs[role] = (a, torch.randn(layer.out_features, rank, generator=generator))
    return pairs


def _file(folder: Path, tensors: dict[str, Tensor], name: str = "lora", **metadata: str) -> Path:
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata=metadata or None)
    return folder / f"{name}.safetensors"


def _output(model: nn.Module) -> Tensor:
    return LoraSet(Pipe(transformer=model, text_encoder=None))._probe(model)


def _merged(model: nn.Module, differences: dict[str, Tensor]) -> Tensor:
    """The output of a copy whose parameters have these differences added."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, difference in differences.items():
            copied.get_parameter(name).add_(difference)
    return _output(copied)


def _close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-5 * second.abs().max())


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_acts_like_merged_weights(
    layout: str,
    alpha: float | None,
    family: str,
    stock: dict[str, nn.Module],
    untouched: dict[str, nn.Module],
    loras: LoraSet,
    tmp_path: Path,
) -> None:
    """Prefixes, flattened and released names, both pairs of words, alpha or none, ranks per layer."""
    prefix, flat, released, (down, up) = LAYOUTS[layout]
    tensors, differences = {}, {}
    model = stock[family]
    before = _output(model)
    for role, (a, b) in _matrices(model, family).items():
        name = LAYERS[family][role][released]
        key = prefix + (name.replace(".", "_") if flat else name)
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / len(a)
        differences[f"{LAYERS[family][role][0]}.weight"] = 0.7 * scale * b @ a
    expected = _merged(untouched[family], differences)
    loras.load(_file(tmp_path, tensors), 0.7)
    assert _close(_output(model), expected)
    assert not _close(before, expected)
    loras.unload(["lora"])
    assert torch.equal(_output(model), before)


def _lokr(name: str, layer: nn.Linear, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """A LoKr of a layer with 2 × 2 as its small factor, and its update."""
    w1, rows, columns = torch.randn(2, 2), layer.out_features // 2, layer.in_features // 2
    left, right, small = torch.randn(rows, 2), torch.randn(2, columns), torch.randn(2, 1)
    tensors = {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.0)}
    update = 0.5 * torch.kron(w1, left @ right)
    if kind == "whole":  # LyCORIS ignores alpha here
        tensors = {"lokr_w1": w1, "lokr_w2": left @ right, "alpha": torch.tensor(1.0)}
        update = torch.kron(w1, left @ right)
    if kind == "both":
        tensors |= {"lokr_w1_a": small, "lokr_w1_b": small.T}
        del tensors["lokr_w1"]
        update = 0.5 * torch.kron(small @ small.T, left @ right)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, update


@pytest.mark.parametrize("kind", ["whole", "half", "both", "loha", "diff"])
def test_other_kinds_act_as_their_exact_update(
    kind: str,
    family: str,
    stock: dict[str, nn.Module],
    untouched: dict[str, nn.Module],
    loras: LoraSet,
    tmp_path: Path,
) -> None:
    """LoKr, LoHa and full differences, as low-rank products that are equal to them."""
    torch.manual_seed(3)
    name = LAYERS[family]["attn.q"][0]
    layer = stock[family].get_submodule(name)
    if kind == "loha":
        shapes = {"w1_a": (24, 2), "w1_b": (2, 24)}
        size, inner = layer.out_features, layer.in_features
        shapes = {"w1_a": (size, 2), "w1_b": (2, inner), "w2_a": (size, 2), "w2_b": (2, inner)}
        parts = {key: torch.randn(shape) for key, shape in shapes.items()}
        update = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
        tensors = {f"lycoris_{name.replace('.', '_')}.hada_{key}": part for key, part in parts.items()}
    elif kind == "diff":
        update = torch.randn(layer.weight.shape)
        tensors = {f"diffusion_model.{name}.diff": update}
    else:
        tensors, update = _lokr(f"lycoris_{name.replace('.', '_')}", layer, kind)
    expected = _merged(untouched[family], {f"{name}.weight": update})
    loras.load(_file(tmp_path, tensors))
    assert _close(_output(stock[family]), expected)


def test_biases_and_norms_change_and_come_back(
    family: str, stock: dict[str, nn.Module], untouched: dict[str, nn.Module], loras: LoraSet, tmp_path: Path
) -> None:
    """`.diff_b`, `.diff` of a norm and LyCORIS's names of both, with a LoRA of the same layer."""
    model = stock[family]
    name, role = LAYERS[family]["attn.q"][0], "attn.q"
    norm = name.replace("to_q", "norm_q")
    a, b = _matrices(model, family)[role]
    bias = torch.randn(model.get_submodule(name).bias.shape)
    scale = torch.randn(model.get_submodule(norm).weight.shape)
    before = _output(model)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    tensors |= {f"{name}.diff_b": bias, f"{norm}.diff": scale}
    expected = _merged(
        untouched[family],
        {f"{name}.weight": 0.5 * b @ a, f"{name}.bias": 0.5 * bias, f"{norm}.weight": 0.5 * scale},
    )
    loras.load(_file(tmp_path, tensors), 0.5)
    assert _close(_output(model), expected)
    loras.load(_file(tmp_path, {f"{norm}.w_norm": scale, f"{name}.b_norm": bias}, "norms"), -0.5)
    assert _close(_output(model), _merged(untouched[family], {f"{name}.weight": 0.5 * b @ a}))
    assert set(loras.weights()) == {"lora", "norms"}
    loras.set_weights({"lora": 0.0, "norms": 0.0})
    assert torch.equal(_output(model), before)


def test_dora_acts_as_its_formula(
    family: str, stock: dict[str, nn.Module], untouched: dict[str, nn.Module], loras: LoraSet, tmp_path: Path
) -> None:
    """Liu et al. 2024 (arXiv 2402.09353): rows of W + BA, stretched to the lengths in the file."""
    model, name = stock[family], LAYERS[family]["attn.q"][0]
    a, b = _matrices(model, family)["attn.q"]
    weight = model.get_submodule(name).weight
    lengths = 1 + torch.arange(len(b)) / len(b)
    moved = weight + b @ a
    difference = moved * (lengths / moved.norm(dim=1))[:, None] - weight
    tensors = {"lora_down.weight": a, "lora_up.weight": b, "dora_scale": lengths[:, None]}
    loras.load(_file(tmp_path, {f"{name}.{key}": tensor for key, tensor in tensors.items()}))
    assert _close(_output(model), _merged(untouched[family], {f"{name}.weight": difference}))


@pytest.mark.parametrize("where", ["metadata", "config", "rslora"])
def test_alphas_of_a_peft_config_count(
    where: str,
    family: str,
    stock: dict[str, nn.Module],
    untouched: dict[str, nn.Module],
    loras: LoraSet,
    tmp_path: Path,
) -> None:
    """Alpha and its pattern, in diffusers' metadata or in `adapter_config.json` beside the file."""
    model, tensors, differences = stock[family], {}, {}
    names = {role: names[0] for role, names in LAYERS[family].items()}
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "alpha_pattern": {names["mlp.in"]: 1}}
    config["use_rslora"] = where == "rslora"
    for role, (a, b) in _matrices(model, family).items():
        alpha = 1 if role == "mlp.in" else 8
        scale = alpha / (len(a) ** 0.5 if where == "rslora" else len(a))
        differences[f"{names[role]}.weight"] = scale * b @ a
        tensors |= {f"transformer.{names[role]}.lora_A.weight": a}
        tensors |= {f"transformer.{names[role]}.lora_B.weight": b}
    metadata = {}
    if where == "metadata":
        stated = {f"transformer.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(stated)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loras.load(_file(tmp_path, tensors, "adapter_model", **metadata))
    assert _close(_output(model), _merged(untouched[family], differences))


def test_loras_add_up_and_follow_their_weights(
    family: str, stock: dict[str, nn.Module], untouched: dict[str, nn.Module], loras: LoraSet, tmp_path: Path
) -> None:
    model, names = stock[family], LAYERS[family]
    pairs = _matrices(model, family)
    for role in ("attn.q", "mlp.in"):
        a, b = pairs[role]
        tensors = {f"{names[role][0]}.lora_A.weight": a, f"{names[role][0]}.lora_B.weight": b}
        loras.load(_file(tmp_path, tensors, role.replace(".", "")), 0.5)
    query = {f"{names['attn.q'][0]}.weight": pairs["attn.q"][1] @ pairs["attn.q"][0]}
    inner = {f"{names['mlp.in'][0]}.weight": pairs["mlp.in"][1] @ pairs["mlp.in"][0]}
    assert _close(
        _output(model), _merged(untouched[family], {k: 0.5 * v for k, v in (query | inner).items()})
    )
    loras.set_weights({"attnq": -2.0, "mlpin": 0.0})
    assert loras.weights() == {"attnq": -2.0, "mlpin": 0.0}
    assert _close(_output(model), _merged(untouched[family], {k: -2 * v for k, v in query.items()}))
    with pytest.raises(ValueError, match="attnq"):
        loras.load(tmp_path / "attnq.safetensors")
    loras.load(tmp_path / "attnq.safetensors", 1.0, "again")
    assert _close(_output(model), _merged(untouched[family], {k: -v for k, v in query.items()}))


def test_adapters_loaded_by_hand_are_seen(
    family: str, stock: dict[str, nn.Module], untouched: dict[str, nn.Module], loras: LoraSet, tmp_path: Path
) -> None:
    model, name = stock[family], LAYERS[family]["attn.q"][0]
    a, b = _matrices(model, family)["attn.q"]
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="mine")
    assert loras.weights() == {"mine": 1.0}
    loras.load(_file(tmp_path, tensors), 0.25)
    assert loras.weights() == {"mine": 1.0, "lora": 0.25}
    assert _close(_output(model), _merged(untouched[family], {f"{name}.weight": 1.25 * b @ a}))
    digests = {key: about["digest"] for key, about in loras.describe().items()}
    assert digests["mine"] == digests["lora"]
    model.disable_lora()
    assert loras.weights() == {"mine": 0.0, "lora": 0.0}


def test_other_adapters_loaded_by_hand_are_seen(
    family: str, stock: dict[str, nn.Module], loras: LoraSet
) -> None:
    """A LoKr that peft put there has a weight and a digest, and can be weighted and unloaded."""
    model = stock[family]
    before = _output(model)
    torch.manual_seed(0)
    target = [LAYERS[family]["attn.q"][0]]
    model.add_adapter(LoKrConfig(r=2, alpha=4, target_modules=target, init_weights=False), "kron")
    assert loras.weights() == {"kron": 1.0}
    digest = loras.describe()["kron"]["digest"]
    loras.set_weights({"kron": 0.5})
    assert loras.weights() == {"kron": 0.5}
    assert not torch.equal(_output(model), before)
    assert loras.describe()["kron"] == {"weight": 0.5, "digest": digest}
    loras.set_weights({"kron": 0.0})
    assert torch.equal(_output(model), before)


def _bad_files(name: str, a: Tensor, b: Tensor) -> dict[str, dict[str, Tensor]]:
    pair = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return {
        "another layer": {**pair, "transformer_blocks.9.attn.to_q.lora_A.weight": a},
        "no suffix": {**pair, f"{name}.weight": b},
        "half": {f"{name}.lora_A.weight": a},
        "narrow": {f"{name}.lora_A.weight": a[:, :-1], f"{name}.lora_B.weight": b},
        "ranks": {f"{name}.lora_A.weight": a[:-1], f"{name}.lora_B.weight": b},
        "zero": {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": 0 * b},
        "twice": {**pair, f"transformer.{name}.lora_A.weight": a},
        "tucker": {**pair, f"{name}.lora_mid.weight": torch.ones(4, 4)},
        "lokr tucker": {f"{name}.lokr_w1": b, f"{name}.lokr_w2": b, f"{name}.lokr_t2": b},
        "half a lokr": {f"{name}.lokr_w1": b},
        "half a loha": {f"{name}.hada_w1_a": b},
        "dora along inputs": {**pair, f"{name}.dora_scale": torch.ones(1, 7)},
        "bias": {**pair, f"{name}.diff_b": torch.ones(3)},
        "nan": {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": float("nan") * b},
        "flat": {f"{name}.lora_A.weight": a[0], f"{name}.lora_B.weight": b[0]},
        "loha of two sizes": {
            **{f"{name}.hada_w1_{part}": matrix for part, matrix in (("a", b), ("b", a))},
            **{f"{name}.hada_w2_{part}": matrix for part, matrix in (("a", b[:-1]), ("b", a))},
        },
        "two alphas": {**pair, f"{name}.alpha": torch.ones(2)},
        "oft": {f"{name}.oft_blocks": torch.ones(2, 2, 2)},
        "text encoder": {**pair, "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight": a},
    }


BAD = list(_bad_files("layer", torch.ones(1, 1), torch.ones(1, 1)))


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_would_not_act_whole_is_refused(
    fault: str, stock: dict[str, nn.Module], tmp_path: Path
) -> None:
    """One line, and the pipeline stays as it was."""
    model, name = stock["qwen"], LAYERS["qwen"]["attn.q"][0]
    loras, before = LoraSet(Pipe(transformer=model, text_encoder=None)), _output(model)
    a, b = _matrices(model, "qwen")["attn.q"]
    with pytest.raises(ValueError, match=r"lora\.safetensors") as error:
        loras.load(_file(tmp_path, _bad_files(name, a, b)[fault]))
    assert "\n" not in str(error.value)
    assert loras.weights() == {}
    assert not hasattr(model, "peft_config")
    assert torch.equal(_output(model), before)


def test_unmatched_keys_are_listed(stock: dict[str, nn.Module], tmp_path: Path) -> None:
    loras = LoraSet(Pipe(transformer=stock["qwen"], text_encoder=None))
    keys = [f"blocks.{number}.self_attn.q.lora_A.weight" for number in range(5)]
    with pytest.raises(ValueError, match=r"5 of 5 keys .*blocks\.0\.self_attn\.q\.lora_A\.weight"):
        loras.load(_file(tmp_path, {key: torch.ones(2, 2) for key in keys}))


def test_a_rank_beyond_use_is_refused(
    stock: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vision_bridge.loading.lora_layouts.MAX_RANK", 8)
    name = LAYERS["qwen"]["attn.q"][0]
    weight = stock["qwen"].get_submodule(name).weight
    loras = LoraSet(Pipe(transformer=stock["qwen"], text_encoder=None))
    with pytest.raises(ValueError, match="rank 32"):
        loras.load(_file(tmp_path, {f"{name}.diff": torch.ones_like(weight)}))


def test_a_lora_without_effect_is_refused(
    stock: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward passes with and without it are compared; here peft's layers are kept from acting."""
    name = LAYERS["qwen"]["attn.q"][0]
    a, b = _matrices(stock["qwen"], "qwen")["attn.q"]
    monkeypatch.setattr(
        "peft.tuners.lora.layer.Linear.forward", lambda layer, x, *_, **__: layer.base_layer(x)
    )
    loras = LoraSet(Pipe(transformer=stock["qwen"], text_encoder=None))
    with pytest.raises(ValueError, match="the same with it and without"):
        loras.load(_file(tmp_path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}))
    assert loras.weights() == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.5", ("style.safetensors", 0.5)),
        ("owner/name:-1", ("owner/name", -1.0)),
        (r"C:\loras\style.safetensors", (r"C:\loras\style.safetensors", 1.0)),
        ("style.safetensors:nan", ("style.safetensors:nan", 1.0)),
    ],
)
def test_a_file_and_its_weight_are_told_apart(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


def test_a_file_is_found_in_a_folder(tmp_path: Path) -> None:
    one = _file(tmp_path, {"x": torch.ones(1)}, "one")
    assert find_lora(one) == find_lora(tmp_path) == one
    two = _file(tmp_path, {"x": torch.ones(1)}, "two")
    assert find_lora(tmp_path, "two.safetensors") == two
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors"):
        find_lora(tmp_path)
    with pytest.raises(FileNotFoundError, match="three"):
        find_lora(tmp_path, "three.safetensors")
    with pytest.raises(ValueError, match="pickled"):
        find_lora(tmp_path / "lora.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_lora(tmp_path / "nowhere.safetensors")


def test_text_encoder_keys_act_and_are_announced(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the names that ComfyUI, kohya and peft use; unloading leaves the stock encoder."""
    loras, encoder = LoraSet(pipe), pipe.text_encoder
    layer = encoder.get_submodule("model.language_model.layers.1.self_attn.q_proj")
    a, b = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    before = loras._probe(encoder)
    expected = copy.deepcopy(encoder)
    expected.get_parameter("model.language_model.layers.1.self_attn.q_proj.weight").data += b @ a
    for number, prefix in enumerate(
        ("text_encoder.model.language_model.", "text_encoders.qwen25_7b.transformer.model.", "lora_te_model_")
    ):
        name = f"{prefix}layers.1.self_attn.q_proj"
        name = name.replace(".", "_") if prefix.startswith("lora_te") else name
        file = _file(tmp_path, {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, f"e{number}")
        with caplog.at_level(logging.WARNING):
            loras.load(file)
        assert "text encoder" in caplog.text
        assert _close(loras._probe(encoder), loras._probe(expected))
        loras.unload([f"e{number}"])
        assert torch.equal(loras._probe(encoder), before)
        caplog.clear()


def test_a_lora_on_the_vision_tower_needs_consent(pipe: Any, tmp_path: Path) -> None:
    loras = LoraSet(pipe)
    name = "model.visual.blocks.0.attn.proj"
    layer = pipe.text_encoder.get_submodule(name)
    tensors = {
        f"text_encoder.{name}.lora_A.weight": torch.randn(2, layer.in_features),
        f"text_encoder.{name}.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    with pytest.raises(ValueError, match="vision_tower=True"):
        loras.load(_file(tmp_path, tensors))
    loras.load(_file(tmp_path, tensors), vision_tower=True)
    assert loras.weights() == {"lora": 1.0}
    loras.unload(["lora"])


def test_group_offload_keeps_a_lora_and_refuses_norms(pipe: Any, tmp_path: Path) -> None:
    """Hooks that move layers in and out stay on; what they would lose is refused."""
    from diffusers.hooks import apply_group_offloading

    model, name = copy.deepcopy(pipe.transformer), LAYERS["qwen"]["attn.q"][0]
    loras = LoraSet(Pipe(transformer=model, text_encoder=None))
    before = loras._probe(model)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    size = model.get_submodule(name).in_features
    tensors = {f"{name}.lora_A.weight": torch.randn(2, size), f"{name}.lora_B.weight": torch.randn(size, 2)}
    expected = copy.deepcopy(pipe.transformer)
    expected.get_parameter(f"{name}.weight").data += (
        tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    )
    loras.load(_file(tmp_path, tensors))
    assert _close(loras._probe(model), _output(expected))
    loras.unload(["lora"])
    assert torch.equal(loras._probe(model), before)
    with pytest.raises(ValueError, match=r"bias\.safetensors: .*offload"):
        loras.load(_file(tmp_path, {f"{name}.diff_b": torch.ones(size)}, "bias"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MEMORY_MODES, ids=lambda mode: mode.name)
def test_a_lora_and_a_bridge_act_in_every_memory_mode(mode: MemoryMode, photo: Any, tmp_path: Path) -> None:
    """8-bit, 4-bit, model, group and sequential offload: both act, together and apart; unloading is stock."""
    import numpy as np

    from qwen_vision_bridge import EnhancedQwenImageEdit

    quantised = {"load_in_8bit": mode.bits == 8, "load_in_4bit": mode.bits == 4}
    own = EnhancedQwenImageEdit("miniature", bridge="random", offload=mode.offload, **quantised)
    own.pipe.set_progress_bar_config(disable=True)
    name = LAYERS["qwen"]["attn.q"][0]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 192, generator=generator),
        f"{name}.lora_up.weight": torch.randn(192, 4, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }

    def edit(enhanced: bool) -> Any:
        return np.asarray(own.generate(photo, "make it blue", enhanced, num_inference_steps=2))

    stock, bridged = edit(False), edit(True)
    assert np.array_equal(edit(False), stock)
    own.load_lora(_file(tmp_path, tensors), 0.5)
    alone, both = edit(False), edit(True)
    seen = {image.tobytes() for image in (stock, bridged, alone, both)}
    assert len(seen) == 4
    own.set_lora("lora", 0)
    assert np.array_equal(edit(False), stock)
    own.unload_lora()
    assert np.array_equal(edit(False), stock)
    assert np.array_equal(edit(True), bridged)
