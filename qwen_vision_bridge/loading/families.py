"""Families from what a user names: registered models, hub ids, local folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..io import read_json
from ..specs import EditorSpec, Family, ModelSpec
from .hub import hub_file, is_hub_id
from .registry import EDITORS, FAMILIES, MODELS

Spec = TypeVar("Spec", ModelSpec, EditorSpec)


def resolve_family(
    family: str | Family,
    source: str | Path | None = None,
    target: str | Path | None = None,
    editor: str | Path | None = None,
) -> Family:
    """The named family, with any role taken by another registered name, hub id or local folder.

    Raises:
        ValueError: an unknown family or model name, or a folder whose config is of another kind.
        FileNotFoundError: a folder without a config.
    """
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: choose one of {', '.join(sorted(FAMILIES))}")
        family = FAMILIES[family]
    if source is not None:
        family = replace(family, source=_resolve_model("source", source))
    if target is not None:
        family = replace(family, target=_resolve_model("target", target))
    if editor is not None:
        family = replace(family, editor=_resolve_editor(editor, family.editor))
    return family


def with_few_steps(family: Family, steps: int | None, lora: str | Path | None = None) -> Family:
    """The family with its editor in few steps and without guidance, by a few-step LoRA.

    Args:
        steps: None leaves the family as it is, unless there is a LoRA: then 4.
        lora: file, folder or hub id; None takes the editor's own for these steps.

    Raises:
        ValueError: the editor has no LoRA for these steps.
    """
    if steps is None and lora is None:
        return family
    steps, editor = 4 if steps is None else steps, family.editor
    known = dict(editor.few_steps)
    if lora is None and steps not in known:
        numbers = ", ".join(map(str, known)) or "none"
        raise ValueError(
            f"{editor.name} has no LoRA for {steps} steps (there is: {numbers}): give a file as fast_lora"
        )
    editor = replace(editor, few_step_lora=str(lora or known[steps]))
    return replace(family, editor=editor, steps=steps, true_cfg_scale=1.0, negative_prompt=None)


def _resolve_model(role: str, model: str | Path) -> ModelSpec:
    registered = {spec.name: spec for spec in MODELS.values() if spec.role == role}
    if spec := _registered(registered, model):
        return spec
    config, where = _read_config(f"{role} model", model, "config.json", registered)
    spec = ModelSpec.from_config(config, **where)
    # A copy of a released model takes the released name, so that bridges trained for it fit.
    for known in MODELS.values():
        if spec.shapes == known.shapes:
            spec = replace(spec, name=known.name)
    if spec.role != role:
        raise ValueError(f"{model} is a {spec.model_type} model and cannot be the {role}")
    return spec


def _resolve_editor(editor: str | Path, base: EditorSpec) -> EditorSpec:
    if spec := _registered(EDITORS, editor):
        return spec
    index, where = _read_config("editor", editor, "model_index.json", EDITORS)
    pipeline_class = index.get("_class_name", "nothing")
    if pipeline_class not in (classes := sorted({spec.pipeline_class for spec in EDITORS.values()})):
        raise ValueError(
            f"{editor} is a pipeline of class {pipeline_class}, needed is {' or '.join(classes)}"
        )
    # Image sizes are no part of a checkpoint: it keeps those of the family it is used in. A few-step LoRA is
    # made for certain weights: a copy keeps its model's by the name of its folder.
    named = EDITORS.get(Path(where["repo"]).name)
    few_steps = () if named is None else named.few_steps
    return replace(
        base,
        pipeline_class=pipeline_class,
        revision=None,
        name=where["name"],
        repo=where["repo"],
        few_steps=few_steps,
    )


def _registered(specs: Mapping[str, Spec], name: str | Path) -> Spec | None:
    """The spec of this name or hub id."""
    return next((spec for spec in specs.values() if str(name) in (spec.name, spec.repo)), None)


def _read_config(
    kind: str, location: str | Path, file: str, registered: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A config file of a folder or of the hub, and the name and repo of a spec for it."""
    folder = Path(location).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: give the folder of a whole {kind}")
        return read_json(folder / file), {"name": folder.name, "repo": str(folder)}
    if is_hub_id(str(location)):
        return read_json(hub_file(str(location), file)), {"name": str(location), "repo": str(location)}
    names = ", ".join(registered)
    raise ValueError(f"unknown {kind} {str(location)!r}: give a folder, a hub id, or one of {names}")
