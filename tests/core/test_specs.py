"""The registry and what may stand in for its models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from qwen_vision_bridge import specs
from qwen_vision_bridge.io import parse_object
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.registry import EDITORS, FAMILIES, MODELS
from qwen_vision_bridge.specs import ModelSpec


def test_the_registry_holds_every_released_size() -> None:
    sources = {spec.name for spec in MODELS.values() if spec.role == "source"}
    targets = {spec.name for spec in MODELS.values() if spec.role == "target"}
    assert sources >= {f"Qwen3-VL-{size}" for size in ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B")}
    assert targets >= {f"Qwen2.5-VL-{size}" for size in ("3B", "7B", "32B", "72B")}
    assert set(EDITORS) >= {"Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"}
    assert EDITORS["Qwen-Image-Edit"].pipeline_class == "QwenImageEditPipeline"


def test_the_qwen_family_has_the_released_shapes() -> None:
    family = FAMILIES["qwen"]
    assert (family.source.token_px, family.source.out_dim, family.source.levels) == (32, 4096, (8, 16, 24))
    assert (family.target.token_px, family.target.out_dim) == (28, 3584)


def test_a_role_is_taken_by_name_hub_id_or_folder(source_folder: Path) -> None:
    assert resolve_family("qwen", source="Qwen3-VL-4B").source.out_dim == 2560
    assert resolve_family("qwen", source="Qwen/Qwen3-VL-2B-Instruct").source.name == "Qwen3-VL-2B"
    taken = resolve_family("qwen", source=source_folder).source
    assert (taken.repo, taken.out_dim) == (str(source_folder), 256)


def test_a_folder_with_a_released_models_shapes_goes_by_its_name(source_folder: Path) -> None:
    assert resolve_family("qwen", source=source_folder).source.name == "miniature-source"


def test_an_editor_folder_keeps_the_familys_image_sizes(editor_folder: Path) -> None:
    editor = resolve_family("miniature", editor=editor_folder).editor
    assert (editor.repo, editor.vae_area) == (str(editor_folder), 128 * 128)


def test_a_first_release_editor_gets_its_own_pipeline_class(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    assert resolve_family("qwen", editor=tmp_path).editor.pipeline_class == "QwenImageEditPipeline"
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="of class FluxPipeline"):
        resolve_family("qwen", editor=tmp_path)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown family 'big': choose one of miniature, qwen"):
        resolve_family("big")
    with pytest.raises(ValueError, match=r"unknown source model 'Qwen9'.*Qwen3-VL-8B"):
        resolve_family("qwen", source="Qwen9")
    with pytest.raises(ValueError, match=r"unknown editor 'nothing'.*Qwen-Image-Edit-2509"):
        resolve_family("qwen", editor="nothing")


def test_folders_without_a_config_or_of_another_kind_are_refused(tmp_path: Path, editor_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve_family("qwen", source=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        resolve_family("qwen", editor=tmp_path)
    with pytest.raises(ValueError, match="cannot be the source"):
        resolve_family("qwen", source=editor_folder / "text_encoder")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        resolve_family("qwen", source=tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_family("qwen", source=tmp_path)


def test_an_unregistered_hub_model_is_an_os_error_when_offline() -> None:
    with pytest.raises(OSError, match=r"someone/else: config\.json: not in the local cache"):
        resolve_family("qwen", source="someone/else")
    with pytest.raises(OSError, match=r"someone/else: model_index\.json: not in the local cache"):
        resolve_family("qwen", editor="someone/else")


def test_flat_qwen25_vl_configs_of_the_hub_are_read() -> None:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    flat = {"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_hidden_layers": 28, "vision_config": vision}
    spec = ModelSpec.from_config(flat, name="x", repo="x")
    assert spec.shapes == MODELS["Qwen2.5-VL-7B"].shapes


def _config(spec: ModelSpec, shape: str) -> dict[str, Any]:
    """A config as a release of transformers writes it for a model.

    4.49 writes Qwen2.5-VL's text fields beside the vision config and leaves out what equals its class; 4.57
    nests them, with `rope_scaling`; 5 has `rope_parameters` and states everything.
    """
    vision: dict[str, Any] = {
        "depth": spec.depth,
        "hidden_size": spec.hidden_size,
        "patch_size": spec.patch_size,
        "spatial_merge_size": spec.merge_size,
        "out_hidden_size": spec.out_dim,
    }
    if spec.levels:
        vision["deepstack_visual_indexes"] = list(spec.levels)
    text: dict[str, Any] = {"hidden_size": spec.out_dim, "num_hidden_layers": spec.language_layers}
    if shape == "4.49":
        defaults = CONFIG_MAPPING[spec.model_type]().to_dict()["vision_config"]
        vision = {name: value for name, value in vision.items() if defaults[name] != value}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        flat = spec.role == "target"
        return {"model_type": spec.model_type, "vision_config": vision} | (
            text if flat else {"text_config": text}
        )
    rope = {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text |= (
        {"rope_scaling": rope} if shape == "4.57" else {"rope_parameters": rope | {"rope_type": "default"}}
    )
    return {"model_type": spec.model_type, "vision_config": vision, "text_config": text}


@pytest.mark.parametrize("shape", ["4.49", "4.57", "5"])
@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen2.5-VL-72B", "Qwen3-VL-8B", "Qwen3-VL-30B-A3B"])
def test_configs_of_every_transformers_release_are_read(name: str, shape: str) -> None:
    """A field that is left out has the default of transformers' class: KeyError 'depth' before."""
    config = _config(MODELS[name], shape)
    assert ("depth" in config["vision_config"]) == (shape != "4.49")
    assert ModelSpec.from_config(config, name="x", repo="x").shapes == MODELS[name].shapes


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_config", "depth", "6"),
        ("vision_config", "depth", True),
        ("vision_config", "hidden_size", None),
        ("vision_config", "patch_size", 0),
        ("vision_config", "spatial_merge_size", 2.0),
        ("vision_config", "deepstack_visual_indexes", None),
        ("vision_config", "deepstack_visual_indexes", [1, 3, 50]),
        ("vision_config", "deepstack_visual_indexes", [1, 3]),
        ("vision_config", "deepstack_visual_indexes", [5, 3, 1]),
        ("text_config", "num_hidden_layers", 0),
    ],
)
def test_a_config_with_a_broken_field_is_named_by_it(
    section: str, field: str, value: object, source_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((source_folder / "config.json").read_text())
    config[section] = {**config[section], field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {section}\.{field} is .*; needed: "):
        resolve_family("miniature", source=tmp_path)


@pytest.mark.parametrize(
    ("section", "value", "names"),
    [
        ("vision_config", None, "vision_config"),
        ("text_config", None, r"text_config\.num_hidden_layers"),
        ("text_config", [], r"text_config\.num_hidden_layers"),
    ],
)
def test_a_config_without_a_section_is_named_by_it(
    section: str, value: object, names: str, source_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((source_folder / "config.json").read_text()) | {section: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=names):
        resolve_family("miniature", source=tmp_path)


def test_a_checkpoint_of_other_sizes_is_named_with_both() -> None:
    expected = MODELS["Qwen3-VL-8B"]
    with pytest.raises(ValueError, match="out_dim 2048 instead of 4096"):
        expected.check(replace(expected, out_dim=2048))


@pytest.mark.slow
@pytest.mark.parametrize("role", ["source", "editor/text_encoder"])
def test_a_mutated_config_is_a_spec_or_one_line(role: str) -> None:
    """5 000 mutations a config: a field dropped, of another type, or another number; or bytes changed."""
    whole = (Path(specs.__file__).parent / "weights" / "miniature" / role / "config.json").read_bytes()
    draw, values = np.random.default_rng(0), [None, True, -1, 0, 2, 1.5, "6", [], {}, [1, 3, 50], 10**30]
    found, lines = [], []
    for number in range(5000):
        data = bytearray(whole)
        if number % 2:
            config = json.loads(whole)
            section = (
                config[str(draw.choice(["vision_config", "text_config"]))] if number % 4 == 1 else config
            )
            name = str(draw.choice(sorted(section)))
            section[name] = values[int(draw.integers(len(values)))]
            if draw.random() < 0.3:
                del section[name]
            data = bytearray(json.dumps(config).encode())
        else:
            for place in draw.integers(0, len(data), 2):
                data[place : place + 1] = draw.bytes(int(draw.integers(0, 3)))
        try:
            config = parse_object(bytes(data), "folder/config.json")
            found.append(ModelSpec.from_config(config, name="a", repo="folder"))
        except ValueError as error:
            lines.append(str(error))
    assert found
    assert lines
    assert all("\n" not in line and ("folder" in line or line.startswith("a:")) for line in lines)
