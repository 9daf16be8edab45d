"""What a loaded pipeline holds that can change an image, as one digest a part: the live half of every key.

A checkpoint's revision says what was loaded; users then change the scheduler, load adapters, set their
weights or overwrite parameters. Parts are digested by content, so equal changes have equal digests in every
process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from ..io import digest_of
from .locks import exclusive

SAMPLES = 4096  # values of a tensor that enter with their positions
LIBRARIES = ("accelerate", "diffusers", "transformers")  # whose hooks observe and offload
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes of a value


@exclusive
def loaded_state(pipe: Any) -> dict[str, str]:
    """A digest of every component of a diffusers pipeline, by its name, and of the pipeline's own settings.

    Covers weights (adapters' included), active adapters with their scales, configs, attention processors,
    hooks, the scheduler, and settings such as tiling or the prompt template.
    """
    state = {"pipeline": digest_of([type(pipe).__name__, _settings(pipe)])}
    for name, part in pipe.components.items():
        state[name] = digest_of([type(part).__name__, _describe(part)])
    return state


def changed_parts(pipe: Any, stock: dict[str, str] | None) -> dict[str, str]:
    """The digests that differ from those of the pipeline as it was loaded; all where that is not known."""
    state = loaded_state(pipe)
    return (
        state
        if stock is None
        else {name: digest for name, digest in state.items() if stock.get(name) != digest}
    )


def weights_digest(module: nn.Module) -> str:
    """Digest of a module's parameters and kept buffers, read once on the device where they lie.

    For each tensor the sum of its bits as integers, which any single change moves, and values at `SAMPLES`
    even steps. Weights that offloading keeps out of reach match nothing, so what was made with them is never
    taken for something else.
    """
    return tensors_digest(_tensors(module))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of named tensors, as `weights_digest`."""
    sums: list[torch.Tensor] = []
    facts: list[Any] = []
    for name, tensor in tensors:
        if tensor.is_meta:
            return uuid4().hex
        bits = tensor.data.contiguous().view(-1)
        bits = bits.view(WORDS[bits.element_size()]) if bits.numel() else bits.to(torch.int64)
        samples = bits[:: max(1, bits.numel() // SAMPLES)].to(torch.int64)
        weights = torch.arange(1, len(samples) + 1, device=samples.device)
        sums += [bits.sum(dtype=torch.int64).cpu(), (samples * weights).sum().cpu()]
        facts.append([name, str(tensor.dtype), list(tensor.shape)])
    return digest_of([facts, [int(value) for value in sums]])


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        # Sequential offloading leaves empty parameters and keeps the weights in a hook.
        offloaded = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        kept = {
            name: buffer
            for name, buffer in part._buffers.items()
            if name not in part._non_persistent_buffers_set
        }
        for name, tensor in (part._parameters | kept).items():
            if tensor is not None:
                yield f"{path}.{name}", offloaded[name] if tensor.is_meta and offloaded else tensor


def _describe(part: Any) -> Any:
    if part is None:
        return None
    if isinstance(part, nn.Module):
        return [weights_digest(part), _config(part), _settings(part), list(_layer_settings(part))]
    if hasattr(part, "get_vocab"):
        return [sorted(part.get_vocab().items()), part.chat_template]
    return _config(part)


def _layer_settings(module: nn.Module) -> Iterator[Any]:
    """What layers hold beside weights: adapters, attention processors and hooks, by the layer's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            scales = getattr(layer, "scaling", {})
            yield name, [(adapter, scales.get(adapter)) for adapter in layer.active_adapters]
            yield name, layer.disable_adapters, sorted(layer.merged_adapters)
        if (processor := getattr(layer, "processor", None)) is not None:
            yield name, type(processor).__name__
        # A hook's own state is out of reach: another object is another hook.
        for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()):
            if getattr(hook, "__module__", "").split(".")[0] not in LIBRARIES:
                yield name, getattr(hook, "__qualname__", type(hook).__name__), id(hook)


def _config(part: Any) -> str:
    """Everything that a component's own config says."""
    if hasattr(part, "to_json_string"):  # processors
        return part.to_json_string()
    config = getattr(part, "config", None)
    if config is not None and hasattr(config, "to_json_string"):  # transformers
        return config.to_json_string(use_diff=False) + str(getattr(config, "_attn_implementation", ""))
    return json.dumps(dict(config or {}), sort_keys=True, default=str)


def _settings(owner: Any) -> dict[str, Any]:
    """Plain public attributes that were set on an object itself, such as `use_tiling`."""
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str)
    }
