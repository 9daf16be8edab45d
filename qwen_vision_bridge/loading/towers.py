"""Load only the vision tower of a checkpoint: pick its tensors, build the bare class, quantise and place it.

Also its processor, and the whole model for features of its language model.

`from_pretrained` of a bare tower class on a whole checkpoint leaves random weights without a word, and
through a key mapping it opens (from the hub: downloads) every shard. Here the tensors under the tower's
prefix are read and nothing else is touched: 1.08 GB of Qwen3-VL-8B's 17.5 GB.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..specs import ModelSpec
from .checkpoints import Checkpoint, locate, open_checkpoint
from .checks import check_tensors, without_loading_reports
from .hub import hub_file
from .locks import exclusive
from .memory import is_out_of_memory

logger = logging.getLogger(__name__)

TOWER_PREFIX = re.compile(r"^(model\.)?visual\.")  # Qwen3-VL and new saves | Qwen2.5-VL on the hub
INT8_THRESHOLD = 6.0  # activations above it stay in 16 bits (LLM.int8(), arXiv 2208.07339)


class LoadedTower(NamedTuple):
    """A vision tower and where it came from."""

    model: nn.Module
    spec: ModelSpec
    revision: str
    bytes_read: int
    """Bytes of weights read for it, file headers included; 0 where they came from the tower cache."""
    total_bytes: int
    """Bytes of the whole checkpoint's weights."""


def load_tower(
    spec: ModelSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_in_8bit: bool = False,
    device_map: str | None = None,
) -> LoadedTower:
    """Load a spec's vision tower in evaluation mode, without gradients.

    Args:
        spec: which model; its sizes are compared with the checkpoint's config.
        device: where the tower goes, unless `device_map` places it.
        dtype: of the weights that are not quantised.
        load_in_8bit: quantise the blocks' linear layers with bitsandbytes; needs CUDA.
        device_map: `"auto"` spreads the tower over the devices through accelerate.

    Raises:
        ValueError: sizes that differ from the spec, or 8-bit without CUDA.
        FileNotFoundError, OSError: missing or damaged files, or no connection.
    """
    if load_in_8bit:
        require_cuda_for_8bit(device)
    started = time.perf_counter()
    checkpoint = open_checkpoint(spec)
    found = ModelSpec.from_config(checkpoint.config, name=spec.name, repo=checkpoint.location)
    spec.check(found)
    tower = cast_weights(build_tower(checkpoint), dtype)
    if load_in_8bit:
        quantise_blocks(tower)
    place(tower, device, device_map)
    report = LoadedTower(tower, spec, checkpoint.revision, checkpoint.bytes_read, checkpoint.total_bytes)
    read = f"{report.bytes_read / 1e6:.1f} MB of {report.total_bytes / 1e6:.1f} MB were read"
    origin = read if report.bytes_read else "from the tower cache"
    logger.info("%s: vision tower in %.1f s, %s", spec.name, time.perf_counter() - started, origin)
    return report


@exclusive
def build_tower(checkpoint: Checkpoint) -> nn.Module:
    """The bare tower with exactly the checkpoint's weights; a missing or left-over tensor is an error.

    Raises:
        ValueError: the checkpoint has no tower, or its tensors do not fit the config.
    """
    from accelerate import init_empty_weights

    tensors = {TOWER_PREFIX.sub("", name): tensor for name, tensor in checkpoint.read(TOWER_PREFIX).items()}
    if not tensors:
        raise ValueError(f"{checkpoint.location} has no tensor under `visual.`: it holds no vision tower")
    # Buffers are made for real: the rotary frequencies are in no checkpoint and would stay empty on `meta`.
    with init_empty_weights(include_buffers=False):
        tower = _tower_class(checkpoint.config["model_type"])(_vision_config(checkpoint.config))
    needed = tower.state_dict()
    wrong = [name for name in needed.keys() & tensors.keys() if needed[name].shape != tensors[name].shape]
    found = {
        "missing_keys": needed.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - needed.keys(),
        "mismatched_keys": wrong,
    }
    check_tensors(checkpoint.location, found)
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower.requires_grad_(False).eval()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring a model's weights to a type, in place, and leave its buffers.

    Those hold the rotary frequencies, which transformers keeps in 32 bits whatever the weights are: in 16
    bits they are off by up to 0.4 %, and with them every position.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@exclusive
def load_whole(
    spec: ModelSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_in_8bit: bool = False,
    device_map: str | None = None,
) -> nn.Module:
    """Load a whole vision-language model through `from_pretrained`, for features of its language model.

    In 8 bits the tower and the output head stay in `dtype`: the tower's features are what is asked for, and
    the language model holds nine tenths of the weights.

    Raises:
        ValueError: 8-bit without CUDA, or missing, unexpected or mismatched tensors.
        OSError: what `from_pretrained` reports of a missing or damaged file.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    # Tensors of another shape are told by `check_tensors`, with their names.
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if load_in_8bit:
        require_cuda_for_8bit(device)
        skipped = ["model.visual", "lm_head"]
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if device_map is not None or load_in_8bit:
        options["device_map"] = device_map or {"": device}
    checkpoint = open_checkpoint(spec)  # says in one line what is missing
    location = checkpoint.location
    spec.check(ModelSpec.from_config(checkpoint.config, name=spec.name, repo=location))
    if not Path(location).is_dir():
        options |= {"subfolder": spec.subfolder, "revision": spec.revision or "main"}
    try:
        with without_loading_reports():
            model, found = AutoModelForImageTextToText.from_pretrained(location, **options)
    except Exception as error:  # of broken files the library raises nearly anything
        if is_out_of_memory(error):
            raise
        raise OSError(
            f"{spec.name} could not be loaded from {location}: {str(error).splitlines()[0]}"
        ) from error
    check_tensors(location, found)
    if "device_map" not in options:
        model.to(device)
    return model.requires_grad_(False).eval()


def load_processor(
    repo: str, subfolder: str = "", revision: str | None = None, images_only: bool = True
) -> Any:
    """Load a checkpoint's image processor, or its whole processor with tokenizer and chat template.

    Raises:
        OSError: the folder has none, or the hub cannot be reached.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    loader = AutoImageProcessor if images_only else AutoProcessor
    location = locate(repo)
    if not Path(location).is_dir():  # fails at once where the hub is out of reach
        hub_file(repo, "preprocessor_config.json", subfolder, revision)
    try:
        return loader.from_pretrained(location, subfolder=subfolder, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no processor could be loaded from {repo}/{subfolder} ({reason})") from error


def quantise_blocks(tower: nn.Module, threshold: float = INT8_THRESHOLD) -> int:
    """Replace the linear layers of the tower's blocks by bitsandbytes 8-bit ones, in place.

    The weights are quantised when the tower moves to its device. The patch embedding is no linear layer, and
    the mergers stay as they are: they write the features themselves.

    Returns:
        How many layers were replaced.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    count = 0
    for parent in tower.blocks.modules():
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            quantised = Linear8bitLt(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                has_fp16_weights=False,
                threshold=threshold,
                device="meta",
            )
            quantised.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            quantised.bias = layer.bias
            setattr(parent, name, quantised)
            count += 1
    return count


def compile_blocks(tower: nn.Module, backend: str = "inductor") -> None:
    """Compile a tower's blocks in place, one graph for all of them; the first batch of a size is slow.

    Attention stays outside the graphs (see `attention.py`); norms, rotations and activations are fused.
    """
    for block in tower.blocks:
        block.compile(backend=backend, dynamic=False)


def place(model: nn.Module, device: torch.device | str, device_map: str | None) -> None:
    """Move a model to its device, or spread it over the devices there are, whole blocks at a time."""
    if device_map is None:
        model.to(device)
        return
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map != "auto":
        raise ValueError(f'device_map is "auto" or None, not {device_map!r}')
    layout = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules))
    if len(set(layout.values())) == 1:
        model.to(next(iter(layout.values())))
    else:
        dispatch_model(model, layout)


def require_cuda_for_8bit(device: torch.device | str = "cuda") -> None:
    """Refuse 8-bit loading where there is no CUDA device to run it on.

    Raises:
        ValueError: says what is there and what to do.
    """
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise ValueError(
            f"load_in_8bit=True needs a CUDA device, the model would run on {torch.device(device).type}: "
            "pass load_in_8bit=False, or use a machine with an NVIDIA GPU"
        )


def _vision_config(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **settings).vision_config


def _tower_class(model_type: str) -> type[nn.Module]:
    if model_type == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        return Qwen2_5_VisionTransformerPretrainedModel
    if model_type == "qwen3_vl_moe":
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

        return Qwen3VLMoeVisionModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    return Qwen3VLVisionModel
