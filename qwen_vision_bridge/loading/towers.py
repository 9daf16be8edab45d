"""Load only the vision tower of a checkpoint: pick its tensors, build the bare class, quantise and place it.

Also its processor, and the whole model for features of its language model.

`from_pretrained` of a bare tower class on a whole checkpoint silently leaves random weights, and with a key
mapping it opens (from the hub: downloads) every shard. Here only the tensors under the tower's prefix are
read: 1.08 GB of Qwen3-VL-8B's 17.5 GB.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..specs import ModelSpec
from .checkpoints import Checkpoint, locate, open_checkpoint
from .checks import check_tensors, one_line_errors, without_loading_reports
from .hub import hub_file
from .locks import exclusive

logger = logging.getLogger(__name__)

TOWER_CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
}
# Parts of a whole model that stay in 16 bits: the tower's output is what features are. "visual" alone would
# not match.
KEPT_IN_16_BITS = ("model.visual", "lm_head")
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
    logger.info("Loading %s model...", "Qwen3-VL" if spec.role == "source" else "Qwen2.5-VL")
    checkpoint = open_checkpoint(spec)
    spec.check(ModelSpec.from_config(checkpoint.config, name=spec.name, repo=checkpoint.location))
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
    """Build the bare tower with exactly the checkpoint's weights.

    Raises:
        ValueError: the checkpoint has no tower or two, or its tensors do not fit the config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    model_type = checkpoint.config["model_type"]
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    tower_class = getattr(module, TOWER_CLASSES[model_type])
    read = checkpoint.read(TOWER_PREFIX)
    tensors = {TOWER_PREFIX.sub("", name): tensor for name, tensor in read.items()}
    if not tensors:
        raise ValueError(f"{checkpoint.location} has no tensor under `visual.`: it holds no vision tower")
    if len(tensors) < len(read):
        twice = f"{len(read) - len(tensors)} tensors under `visual.` and under `model.visual.`"
        raise ValueError(f"{checkpoint.location} holds {twice}: delete those of one")
    # Buffers stay off `meta`: the rotary frequencies are in no checkpoint and would remain empty.
    with init_empty_weights(include_buffers=False):
        tower = tower_class(AutoConfig.for_model(**checkpoint.config).vision_config)
    needed = tower.state_dict()
    common = needed.keys() & tensors.keys()
    report = {
        "missing_keys": needed.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - needed.keys(),
        "mismatched_keys": [name for name in common if needed[name].shape != tensors[name].shape],
    }
    check_tensors(checkpoint.location, report)
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower.requires_grad_(False).eval()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's weights in place, and leave its buffers.

    These hold the rotary frequencies, which transformers keeps in 32 bits: in 16 bits they are off by up to
    0.4 %, and with them every position.
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

    In 8 bits the tower and the output head stay in `dtype`: the language model holds nine tenths of the
    weights.

    Raises:
        ValueError: 8-bit without CUDA, or missing, unexpected or mismatched tensors.
        OSError: what `from_pretrained` reports of a missing or damaged file.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    # `check_tensors` reports tensors of another shape with their names.
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if load_in_8bit:
        require_cuda_for_8bit(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=list(KEPT_IN_16_BITS)
        )
    if device_map is not None or load_in_8bit:
        options["device_map"] = device_map or {"": device}
    checkpoint = open_checkpoint(spec)  # reports in one line what is missing
    location = checkpoint.location
    spec.check(ModelSpec.from_config(checkpoint.config, name=spec.name, repo=location))
    if not Path(location).is_dir():
        options |= {"subfolder": spec.subfolder, "revision": spec.revision or "main"}
    with one_line_errors(spec.name, location), without_loading_reports():
        model, report = AutoModelForImageTextToText.from_pretrained(location, **options)
    check_tensors(location, report)
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
        try:
            hub_file(repo, "preprocessor_config.json", subfolder, revision)
        except OSError as error:
            try:  # transformers 5 writes this one alone
                hub_file(repo, "processor_config.json", subfolder, revision)
            except OSError:
                raise error from None
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

    def in_8_bit(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        quantised = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold, device="meta")
        quantised.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        quantised.bias = layer.bias
        return quantised

    return replace_linears(tower.blocks, in_8_bit)


def replace_linears(
    model: nn.Module, replacement: Callable[[nn.Linear], nn.Module], skip: tuple[str, ...] = ()
) -> int:
    """Replace a model's linear layers in place, except inside the submodules named in `skip`.

    Returns:
        How many layers were replaced.
    """
    count = 0
    for path, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            full_name = f"{path}.{name}".lstrip(".")
            is_kept = any(f"{full_name}.".startswith(f"{kept}.") for kept in skip)
            if type(layer) is nn.Linear and not is_kept:
                setattr(parent, name, replacement(layer))
                count += 1
    return count


def compile_blocks(tower: nn.Module, backend: str = "inductor") -> None:
    """Compile a tower's blocks in place, one graph for all of them; the first batch of a size is slow.

    Attention stays outside the graphs (see `tower_attention`); norms, rotations and activations are fused.
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
        ValueError: names the device and the remedy.
    """
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise ValueError(
            f"load_in_8bit=True needs a CUDA device, the model would run on {torch.device(device).type}: "
            "pass load_in_8bit=False, or use a machine with an NVIDIA GPU"
        )
