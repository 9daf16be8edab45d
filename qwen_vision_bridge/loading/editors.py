"""Load a stock Qwen-Image-Edit pipeline of diffusers in a memory mode, quantised by bitsandbytes or not.

The libraries quantise a model while they load it. For cards that cannot hold what they quantise at once,
`quantise_to_4_bit` does it layer by layer.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..io import folder_digest, read_json
from ..specs import EditorSpec
from .checkpoints import locate
from .checks import check_tensors, one_line_errors, without_loading_reports
from .hub import hub_file
from .locks import exclusive
from .memory import MemoryMode
from .towers import KEPT_IN_16_BITS, replace_linears

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

logger = logging.getLogger(__name__)


@exclusive
def load_pipeline(
    editor: EditorSpec, mode: MemoryMode, device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """Load the stock pipeline, quantised and placed as the mode says.

    Raises:
        FileNotFoundError, OSError, ValueError: what is missing, damaged or out of reach, in one line.
    """
    import diffusers

    layerwise = mode.bits == 4 and mode.offload == "group"
    quantised = quantisation_config(mode.bits, dtype) if mode.bits and not layerwise else {}
    location = locate(editor.repo)
    logger.info("loading %s (%s) from %s", editor.name, mode.name, location)
    if not Path(location).is_dir():  # fails at once where the hub is out of reach
        hub_file(editor.repo, "model_index.json", revision=editor.revision)
    with one_line_errors(editor.name, location):
        pipeline_class = getattr(diffusers, editor.pipeline_class)
        folder = Path(location)
        if not folder.is_dir():
            folder = Path(pipeline_class.download(location, revision=editor.revision, use_safetensors=True))
        with _without_bars():
            pipe = pipeline_class.from_pretrained(folder, **load_models(folder, dtype, quantised))
    if layerwise:
        quantise_to_4_bit(pipe.transformer, device, dtype)
        quantise_to_4_bit(pipe.text_encoder, device, dtype, KEPT_IN_16_BITS)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    _place(pipe, mode, device)
    return pipe


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the libraries' three nested bars; `load_models` shows one of its own."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    try:
        for each in shown:
            each.disable_progress_bar()
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


def _place(pipe: DiffusionPipeline, mode: MemoryMode, device: torch.device) -> None:
    if mode.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif mode.offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)


def load_models(folder: Path, dtype: torch.dtype, quantised: Mapping[str, object]) -> dict[str, nn.Module]:
    """Load every part of a pipeline that has weights, by its name in `model_index.json`.

    Args:
        quantised: quantisation configs by part.

    Raises:
        ValueError: missing, unexpected or mismatched tensors; OSError: missing or damaged files.
    """
    from tqdm import tqdm

    models = {}
    entries = read_json(folder / "model_index.json")
    for name, entry in tqdm(entries.items(), desc="loading the editor", unit="part", leave=False):
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers"):
            continue
        model_class: Any = getattr(importlib.import_module(library), str(class_name), None)
        if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
            continue  # tokenizer, processor, scheduler, or a name that the pipeline's own loader refuses
        options = {"quantization_config": quantised[name]} if name in quantised else {}
        # `check_tensors` reports tensors of another shape; in quantised parts diffusers would drop them all.
        plain = not options and "quantization_config" not in read_json(folder / name / "config.json")
        with without_loading_reports():
            load: Any = model_class.from_pretrained  # type: ignore[attr-defined]
            models[name], report = load(
                folder / name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=plain,
                **options,
            )
        check_tensors(name, report)
    return models


def few_step_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that few-step LoRAs are distilled for: shift 3 at every size, down to no noise.

    Settings of Qwen-Image-Lightning (github.com/ModelTC/Qwen-Image-Lightning).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=math.log(3),
        max_image_seq_len=8192,
        max_shift=math.log(3),
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=None,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def editor_revision(editor: EditorSpec) -> str:
    """The commit of a hub editor that is in the local cache, or `local:` and a digest of a folder's files."""
    location = Path(locate(editor.repo))
    if location.is_dir():
        files = [path for path in location.rglob("*") if path.suffix in (".json", ".safetensors")]
        return folder_digest(location, files)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(editor.repo, "model_index.json", revision=editor.revision)
    return Path(cached).parent.name if isinstance(cached, str) else "not cached"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def quantisation_config(bits: int, dtype: torch.dtype) -> dict[str, object]:
    """bitsandbytes configs by part of a pipeline; the target tower stays in 16 bits."""
    from diffusers import BitsAndBytesConfig as DiffusersConfig
    from transformers import BitsAndBytesConfig as TransformersConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    encoder = TransformersConfig(**settings, llm_int8_skip_modules=list(KEPT_IN_16_BITS))
    return {"transformer": DiffusersConfig(**settings), "text_encoder": encoder}


def quantise_to_4_bit(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> int:
    """Quantise a model's linear layers to NF4 on a device, one at a time, their weights left in CPU memory.

    The libraries' loaders quantise whole models on the GPU: 12 GB for the transformer, which a card of 12 GB
    does not have. The scales (an eighth of the weights' bytes) stay on the device, where group offloading,
    which moves parameters alone, leaves them.

    Args:
        model: in CPU memory, in 16 bits.
        skip: names of submodules that stay as they are.

    Returns:
        How many layers were replaced.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    def in_4_bit(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        quantised = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantised)
        quantised.weight = weight.to(device)  # quantises
        quantised.weight.data = quantised.weight.data.cpu()
        quantised.bias = layer.bias
        return quantised

    return replace_linears(model, in_4_bit, skip)
