"""LoRAs on a stock pipeline that provably act: loaded whole, weighted, combined and unloaded again.

A file is refused unless every key of it lands on a layer, its matrices are not zero, and a small forward pass
differs with it. Adapters that were put on the pipeline by hand are seen, weighted and unloaded as well.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import without_adapter_reports
from .fingerprint import tensors_digest
from .locks import exclusive
from .lora_files import check_weight, find_lora, read_lora
from .lora_layouts import LoraTensors, canonical, module_name, split
from .lora_probe import probe_inputs

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "text_encoder")
IN_THE_TOWER = re.compile(r"(^|\.)visual\.")


class LoraSet:
    """The LoRAs of one stock pipeline, by name.

    Args:
        pipe: a diffusers pipeline with a `transformer`, and a `text_encoder` where files change that too.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._additions: dict[str, dict[str, Tensor]] = {}  # by LoRA and parameter
        self._weights: dict[str, float] = {}  # of LoRAs with additions
        self._originals: dict[str, Tensor] = {}

    @exclusive
    def load(
        self,
        location: str | Path,
        weight: float = 1.0,
        name: str | None = None,
        weight_name: str | None = None,
        vision_tower: bool = False,
    ) -> str:
        """Load a file and prove that it acts.

        Args:
            location, weight_name: as `find_lora`.
            weight: scales its update.
            name: by which it is known afterwards; None takes the file's.
            vision_tower: accept changes of the target's vision tower, which the bridge stands on.

        Returns:
            The name.

        Raises:
            ValueError: keys that match no layer, an unknown kind, zero matrices, no effect, a name in use.
            FileNotFoundError, OSError: no such file.
        """
        weight, path = check_weight(weight), find_lora(location, weight_name)
        name = re.sub(r"[^\w-]", "_", name or path.stem)
        weights = self.weights()
        if name in weights:
            raise ValueError(f"a LoRA named {name!r} is loaded already: unload it, or give another name")
        try:
            parts = self._read(path, vision_tower)
            for component, lora in parts.items():
                self._attach(component, lora, name)
            self.set_weights({**weights, name: weight or 1.0})
            for component, lora in parts.items():
                self._verify(component, lora, name)
            self.set_weights({**weights, name: weight})
        except BaseException as error:
            self._remove(name)
            self.set_weights(weights)
            if isinstance(error, ValueError):
                raise ValueError(f"{path.name}: {error}") from error
            raise
        return name

    def weights(self) -> dict[str, float]:
        """The weight of every LoRA on the pipeline by name, those loaded by hand included; 0 is inactive."""
        found = dict(self._weights)
        for _, layer in self._layers():
            for name in getattr(layer, "scaling", {}):
                scale = layer.scaling[name] / _unit(layer, name)
                active = name in layer.active_adapters and not layer.disable_adapters
                found.setdefault(name, scale if active else 0.0)
        return found

    @exclusive
    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weight of every LoRA; those that are not named get 0, which leaves the layers stock."""
        active = [name for name, weight in weights.items() if weight]
        for _, layer in self._layers():
            layer.enable_adapters(True)
            here = [name for name in active if name in layer.scaling]
            layer.set_adapter(here)
            layer.requires_grad_(False)
            for name in here:
                layer.set_scale(name, weights[name])
            if magnitudes := getattr(layer, "lora_magnitude_vector", None):
                magnitudes.train().eval()  # forgets norms of old weights
        self._weights = {name: weights.get(name, 0.0) for name in self._weights}
        self._add_differences()

    @exclusive
    def unload(self, names: list[str]) -> None:
        """Take LoRAs off the pipeline; without any left it is the stock pipeline again, bit for bit.

        Raises:
            ValueError: a name that no LoRA has.
        """
        weights = {name: weight for name, weight in self.named(names).items() if name not in names}
        for name in names:
            self._remove(name)
        self.set_weights(weights)

    def named(self, names: Iterable[str]) -> dict[str, float]:
        """The weights, where every one of these names is that of a LoRA.

        Raises:
            ValueError: one that is not.
        """
        weights = self.weights()
        for name in names:
            if name not in weights:
                raise ValueError(f"no LoRA is named {name!r}; loaded: {', '.join(weights) or 'none'}")
        return weights

    @exclusive
    @torch.no_grad()
    def merge(self, name: str) -> bool:
        """Add a LoRA to the weights for good, which spares its own matrix products in every pass.

        Returns:
            False, with nothing done, where weights are quantised or offloading keeps them out of reach.
        """
        layers = [layer for _, layer in self._layers() if name in layer.scaling]
        bases = [layer.get_base_layer() for layer in layers]
        plain = all(type(base) is nn.Linear and not base.weight.is_meta for base in bases)
        if not plain or _is_group_offloaded(self.pipe.transformer) or name in self._additions:
            return False
        if any(name in layer.lora_magnitude_vector for layer in layers):
            return False
        device = self.pipe._execution_device
        for layer, base in zip(layers, bases, strict=True):
            a, b = (part[name].weight.to(device, torch.float32) for part in (layer.lora_A, layer.lora_B))
            base.weight.copy_(base.weight.to(device, torch.float32) + layer.scaling[name] * b @ a)
        self.unload([name])
        return True

    def describe(self) -> dict[str, dict[str, Any]]:
        """Weight and digest of the tensors of every LoRA, for keys and results files."""
        parts: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in self.weights()}
        for path, layer in self._layers():
            for kind in layer.adapter_layer_names:  # of any kind of adapter that peft knows
                for name, held in getattr(layer, kind, {}).items():
                    tensor = held.weight if isinstance(held, nn.Module) else held
                    parts[name].append((f"{path}.{kind}", tensor))
        for name, added in self._additions.items():
            parts[name] += list(added.items())
        weights = self.weights()
        return {
            name: {"weight": weights[name], "digest": tensors_digest(tensors)}
            for name, tensors in parts.items()
        }

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """Every layer that a LoRA has wrapped, with its name."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for component in COMPONENTS:
            model = getattr(self.pipe, component, None)
            if isinstance(model, nn.Module) and hasattr(model, "peft_config"):
                for name, layer in model.named_modules():
                    if isinstance(layer, BaseTunerLayer):
                        yield f"{component}.{name}", layer

    def _read(self, path: Path, vision_tower: bool) -> dict[str, LoraTensors]:
        """A file's tensors by the component that they change."""
        tensors, config = read_lora(path)
        parts = {}
        for component, some in zip(COMPONENTS, split(tensors), strict=True):
            model = getattr(self.pipe, component, None)
            if some and model is None:
                raise ValueError(f"the pipeline has no {component} for {len(some)} of its tensors")
            if some:
                parts[component] = canonical(some, model, config)
        for lora in parts.values():
            lora.check()
        if encoder := parts.get("text_encoder"):
            if not vision_tower and any(IN_THE_TOWER.search(name) for name in encoder.names):
                raise ValueError(
                    "it changes the vision tower that the bridge was trained beside: pass vision_tower=True"
                )
            logger.warning("%s changes the text encoder too; bridges were trained without it", path.name)
        return parts

    def _attach(self, component: str, lora: LoraTensors, name: str) -> None:
        model = getattr(self.pipe, component)
        if lora.additions:
            if any(parameter.is_meta for parameter in model.parameters()) or _is_group_offloaded(model):
                raise ValueError(
                    "it changes norms or biases, which offload 'group' and 'sequential' keep out of reach: "
                    "use another memory mode"
                )
            self._additions[name] = self._additions.get(name, {}) | {
                f"{component}.{key}": value for key, value in lora.additions.items()
            }
            self._weights.setdefault(name, 0.0)
        if not lora.pairs:
            return
        tensors: dict[str, Tensor] = {}
        for module, (a, b) in lora.pairs.items():
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        for module, magnitude in lora.magnitudes.items():
            tensors[f"{module}.lora_magnitude_vector"] = magnitude
        config = lora.peft_config()
        with without_adapter_reports():
            if component == "transformer":
                model.load_lora_adapter(
                    tensors, prefix=None, adapter_name=name, metadata=config, _pipeline=self.pipe
                )
                return
            _inject(model, tensors, name, config)

    def _verify(self, component: str, lora: LoraTensors, name: str) -> None:
        """Check that every matrix lies where it belongs, and that the component's output differs."""
        model = getattr(self.pipe, component)
        layers = {path.removeprefix(f"{component}."): layer for path, layer in self._layers()}
        by_name = {module_name(path): layer for path, layer in layers.items()}
        lost = []
        for module, pair in lora.pairs.items():
            layer = by_name.get(module)
            if layer is None or name not in layer.lora_A:
                lost.append(module)
                continue
            kept = (layer.lora_A[name].weight, layer.lora_B[name].weight)
            if not all(map(_equal, kept, pair)):
                lost.append(module)
        if lost:
            raise ValueError(f"{len(lost)} layers did not take it (first: {lost[0]})")
        if all(IN_THE_TOWER.search(each) for each in lora.names):
            model = model.model.visual
        weights = self.weights()
        with_it = self._probe(model)
        self.set_weights({**weights, name: 0.0})
        without = self._probe(model)
        self.set_weights(weights)
        if torch.equal(with_it, without):
            raise ValueError(f"the {component}'s output is the same with it and without")

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        """The output of a component for a few seeded tokens."""
        device, dtype = self.pipe._execution_device, model.dtype
        inputs = probe_inputs(model)
        for key, value in inputs.items():
            if torch.is_tensor(value):
                inputs[key] = value.to(device, dtype if value.is_floating_point() else None)
        output = model(**inputs, return_dict=False)[0]
        self.pipe.maybe_free_model_hooks()
        return output.cpu()

    def _remove(self, name: str) -> None:
        """Take one LoRA off, and the wrappers of layers where it was the last."""
        from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers

        self._additions.pop(name, None)
        self._weights.pop(name, None)
        for component in COMPONENTS:
            model: Any = getattr(self.pipe, component, None)
            if name not in getattr(model, "peft_config", {}):
                continue
            if component == "transformer":  # diffusers' own take offloading into account
                model.delete_adapters(name) if len(model.peft_config) > 1 else model.unload_lora()
                continue
            delete_adapter_layers(model, name)
            if not getattr(model, "peft_config", None):
                recurse_remove_peft_layers(model)

    def _add_differences(self) -> None:
        """Set norms and biases to their own values plus every LoRA's weighted difference."""
        wanted: dict[str, list[tuple[float, Tensor]]] = {key: [] for key in self._originals}
        for name, added in self._additions.items():
            for key, difference in added.items():
                wanted.setdefault(key, []).append((self._weights[name], difference))
        for key, terms in wanted.items():
            component, _, path = key.partition(".")
            module, _, tensor = path.rpartition(".")
            layer = getattr(self.pipe, component).get_submodule(module)
            parameter = getattr(getattr(layer, "base_layer", layer), tensor)
            original = self._originals.setdefault(key, parameter.detach().cpu().clone())
            total = original.float() + sum(weight * difference for weight, difference in terms)
            is_stock = not any(weight for weight, _ in terms)
            parameter.data.copy_(original if is_stock else total)
            if not terms:
                del self._originals[key]


def _equal(kept: Tensor, expected: Tensor) -> bool:
    """Whether a loaded matrix is the file's, as far as sequential offloading lets it be seen."""
    return kept.is_meta or torch.equal(kept.cpu(), expected.to(kept.dtype).cpu())


def _unit(layer: Any, name: str) -> float:
    """The scaling of a layer's adapter at weight 1: alpha / r, or alpha / √r for rsLoRA."""
    rank, alphas = layer.r[name], getattr(layer, "lora_alpha", None) or layer.alpha  # LyCORIS: alpha
    has_root = getattr(layer, "use_rslora", {}).get(name)
    return float(alphas[name]) / (math.sqrt(rank) if has_root else rank)


def _inject(model: nn.Module, tensors: dict[str, Tensor], name: str, config: Mapping[str, Any]) -> None:
    """Put a LoRA into a transformers model."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if _is_group_offloaded(model) or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("it changes the text encoder, which needs another memory mode than this offload")
    inject_adapter_in_model(LoraConfig(**config), model, adapter_name=name, state_dict=tensors)
    set_peft_model_state_dict(model, tensors, name)
    model._hf_peft_config_loaded = True  # transformers' own mark


def _is_group_offloaded(model: nn.Module) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return _is_group_offload_enabled(model)
