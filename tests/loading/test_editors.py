"""An editor has exactly its checkpoint's weights, or is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vision_bridge.loading.editors import load_models, load_pipeline, quantisation_config
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.memory import MEMORY_MODES
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

Tensors = dict[str, torch.Tensor]
PARTS = ("text_encoder", "transformer", "vae")


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], shards: int = 1) -> None:
    """Change a part's tensors and write them as one file, or as shards with their index."""
    old = sorted(folder.glob("*.safetensors"))
    stem = old[0].name.split(".")[0].split("-0")[0]
    tensors = change({name: tensor for path in old for name, tensor in load_file(path).items()})
    for path in [*old, *folder.glob("*.index.json")]:
        path.unlink()
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(sorted(tensors.items())[number::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def copy(editor_folder: Path, tmp_path: Path) -> Path:
    """A copy of the miniature editor, to be broken."""
    return Path(shutil.copytree(editor_folder, tmp_path / "editor"))


def load(folder: Path) -> Any:
    editor = EnhancedQwenImageEdit("miniature", "random", editor=folder, device="cpu", feature_cache=False)
    return editor.pipe


def first_three(tensors: Tensors) -> list[str]:
    return sorted(name for name in tensors if "embed_tokens" not in name)[:3]


def lose(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in first_three(tensors)}


def rename(tensors: Tensors) -> Tensors:
    return lose(tensors) | {f"{name}.other": tensors[name] for name in first_three(tensors)}


def reshape(tensors: Tensors) -> Tensors:
    longer = {name: torch.cat([tensors[name], tensors[name]]) for name in first_three(tensors)}
    return tensors | longer


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "says"), [(lose, "3 missing"), (rename, "3 unexpected"), (reshape, "3 of another shape")]
)
def test_a_part_with_other_tensors_is_refused_by_their_names(
    part: str, change: Callable[[Tensors], Tensors], says: str, copy: Path
) -> None:
    rewrite(copy / part, change)
    with pytest.raises(OSError, match=rf"{part}: .*{says} \(first: \w[\w.]+\)") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_part_that_misses_a_shards_tensors_is_refused(copy: Path) -> None:
    rewrite(copy / "vae", lose, shards=2)
    with pytest.raises(OSError, match=r"vae: .*3 missing"):
        load(copy)


def old_names(tensors: Tensors) -> Tensors:
    """As on the hub: `visual.*`, `model.layers.*`, and the output head beside its tied embeddings."""
    renamed = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
    }
    return renamed | {"lm_head.weight": renamed["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("shards", [1, 3])
def test_old_names_and_shards_load_the_same_weights(shards: int, copy: Path, shared_pipe: Any) -> None:
    rewrite(copy / "text_encoder", old_names, shards)
    for part in ("transformer", "vae"):
        rewrite(copy / part, dict, shards)
    pipe = load(copy)
    for part in PARTS:
        expected = getattr(shared_pipe, part).state_dict()
        loaded = getattr(pipe, part).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in expected.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_an_encoder_quantised_on_loading_or_before_is_complete(bits: int, copy: Path) -> None:
    """bitsandbytes runs on CPUs, where its blocks of 64 divide only the inputs of down_proj."""
    quantised = {"text_encoder": quantisation_config(bits, torch.float32)["text_encoder"]}
    if bits == 4:
        skipped = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
        quantised["text_encoder"].llm_int8_skip_modules += skipped
    encoder = load_models(copy, torch.float32, quantised)["text_encoder"]
    weight = encoder.model.language_model.layers[0].mlp.down_proj.weight
    assert weight.dtype is {8: torch.int8, 4: torch.uint8}[bits]
    shutil.rmtree(copy / "text_encoder")
    encoder.save_pretrained(copy / "text_encoder")
    again = load_models(copy, torch.float32, {})["text_encoder"].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in encoder.state_dict().items())
    norm = "model.norm.weight"
    rewrite(copy / "text_encoder", lambda tensors: {k: v for k, v in tensors.items() if k != norm})
    with pytest.raises(ValueError, match="1 missing"):
        load_models(copy, torch.float32, {})


def test_pickled_weights_of_an_editor_are_never_loaded(copy: Path) -> None:
    weights = next((copy / "vae").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="could not be loaded"):
        load(copy)


@pytest.mark.parametrize("part", PARTS)
def test_nan_weights_are_named_and_make_no_black_image(part: str, copy: Path, photo: Image.Image) -> None:
    poisoned: list[str] = []

    def poison(tensors: Tensors) -> Tensors:
        hidden = next(name for name in sorted(tensors) if "norm" in name and "visual" not in name)
        poisoned.append(hidden)
        return tensors | {hidden: tensors[hidden] * float("nan")}

    rewrite(copy / part, poison)
    editor = EnhancedQwenImageEdit("miniature", "random", editor=copy, device="cpu", feature_cache=False)
    ending = poisoned[0].removeprefix("model.")  # an old name: the model has `model.language_model.`
    with pytest.raises(ValueError, match=rf"NaN or infinity.*{part}\..*{ending}"):
        editor.generate(photo, "make it blue", False, num_inference_steps=2, true_cfg_scale=1.0)


def test_a_stock_editor_is_loaded_without_a_report(
    editor_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    editor = resolve_family("miniature", editor=editor_folder).editor
    pipe = load_pipeline(editor, MEMORY_MODES[0], torch.device("cpu"), torch.float32)
    assert {part: next(getattr(pipe, part).parameters()).dtype for part in PARTS} == dict.fromkeys(
        PARTS, torch.float32
    )
    assert not caplog.records
