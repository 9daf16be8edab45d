"""Load a stock Qwen-Image-Edit pipeline of diffusers in the memory mode that a machine allows.

The needs are estimates from parameter counts at 1024² with one reference image, not measurements.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..specs import EditorSpec, Family, read_json
from .checkpoints import check_tensors, folder_digest, locate, without_loading_reports
from .hub import hub_file
from .locks import exclusive
from .memory import GpuMemoryError, freed_after_out_of_memory, is_out_of_memory, usable_gpu_bytes
from .quantisation import ENCODER_KEPT, quantisation_config, quantise_to_4_bit

logger = logging.getLogger(__name__)

Offload = Literal["model", "group", "sequential"]
OFFLOADS = ("model", "group", "sequential")
WORKING_GB = 6.0  # activations, VAE decoding and the CUDA context at 1024²
BYTES = {None: 2.0, 8: 1.05, 4: 0.58}  # a parameter's bytes by bits, with the scales that quantisation adds
UNQUANTISED_ENCODER_B = 1.77  # of the text encoder: tower and embeddings, which stay in 16 bits


@dataclass(frozen=True)
class MemoryMode:
    """One way to fit the editor into a GPU."""

    name: str
    bits: Literal[4, 8] | None = None
    """bitsandbytes quantisation of DiT and text encoder; None is bf16."""
    offload: Offload | None = None
    """What waits in CPU memory: whole models, groups of layers, or single layers."""

    @property
    def arguments(self) -> str:
        """The arguments of `EnhancedQwenImageEdit` that choose this mode."""
        given = [f"load_in_{self.bits}bit=True"] if self.bits else []
        given += [f'offload="{self.offload}"'] if self.offload else []
        return ", ".join(given) or "none"

    def part_sizes(self, editor: EditorSpec) -> tuple[float, float]:
        """GB of the DiT's weights and of the text encoder's."""
        kept = min(UNQUANTISED_ENCODER_B, editor.encoder_params)
        encoder = (editor.encoder_params - kept) * BYTES[self.bits] + kept * 2.0
        return editor.transformer_params * BYTES[self.bits], encoder

    def weights_gb(self, editor: EditorSpec) -> float:
        """GB of all weights, 10⁹ bytes: what an offloading mode keeps in CPU memory."""
        return sum(self.part_sizes(editor))

    def gpu_gb(self, editor: EditorSpec) -> float:
        """Estimated peak GB on the GPU, 10⁹ bytes; see the module's text."""
        transformer, encoder = self.part_sizes(editor)
        if self.offload is None:
            return transformer + encoder + WORKING_GB
        if self.offload == "model":
            return max(transformer, encoder) + WORKING_GB
        return WORKING_GB + (2.0 if self.offload == "group" else 0.5)


MEMORY_MODES = (
    MemoryMode("plain"),
    MemoryMode("model offload", offload="model"),
    MemoryMode("8-bit", bits=8),
    MemoryMode("8-bit + model offload", bits=8, offload="model"),
    MemoryMode("4-bit", bits=4),
    MemoryMode("4-bit + model offload", bits=4, offload="model"),
    MemoryMode("4-bit + group offload", bits=4, offload="group"),
    MemoryMode("group offload", offload="group"),
    MemoryMode("sequential offload", offload="sequential"),
)


PREFERENCE = (  # of those that fit, the first is recommended
    "plain",
    "8-bit",
    "model offload",
    "8-bit + model offload",
    "4-bit",
    "4-bit + model offload",
    "4-bit + group offload",
    "group offload",
    "sequential offload",
)


def find_mode(load_in_8bit: bool, load_in_4bit: bool, offload: str | None) -> MemoryMode:
    """The mode of these arguments.

    Raises:
        ValueError: both quantisations, an unknown offload, or a pair that the libraries do not support.
    """
    if load_in_8bit and load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other: choose one")
    if offload is not None and offload not in OFFLOADS:
        raise ValueError(f"offload is one of {', '.join(OFFLOADS)} or None, not {offload!r}")
    bits = 8 if load_in_8bit else 4 if load_in_4bit else None
    for mode in MEMORY_MODES:
        if (mode.bits, mode.offload) == (bits, offload):
            return mode
    fitting = [str(mode.offload) for mode in MEMORY_MODES if mode.bits == bits]
    raise ValueError(f"{bits}-bit weights go with offload {', '.join(fitting)}, not with {offload!r}")


def check_device(mode: MemoryMode, device: Any, family: Family, free_gb: float | None) -> None:
    """Refuse a mode before anything is loaded where the device cannot run it.

    Args:
        free_gb: free memory of the GPU, 10⁹ bytes; None on a CPU.

    Raises:
        ValueError: quantisation or offload without CUDA.
        GpuMemoryError: too little memory; the modes that would fit are named with their needs.
    """
    if free_gb is None:
        if mode.bits or mode.offload:
            raise ValueError(
                f"{mode.name} ({mode.arguments}) needs a CUDA device, the pipeline would run on {device}: "
                "leave these arguments out, or use a machine with an NVIDIA GPU"
            )
        return
    need = mode.gpu_gb(family.editor)
    if family.editor.transformer_params and need > free_gb:
        fitting = [other for other in MEMORY_MODES if other.gpu_gb(family.editor) <= free_gb]
        table = "; ".join(
            f"{other.name} ≈ {other.gpu_gb(family.editor):.0f} GB ({other.arguments})" for other in fitting
        )
        raise GpuMemoryError(
            f"{mode.name} needs about {need:.0f} GB of GPU memory, {free_gb:.1f} GB are free; "
            + (
                f"these would fit: {table}"
                if fitting
                else "no mode fits: use --models miniature or a larger GPU"
            )
        )


def free_gpu_gb(device: Any) -> float | None:
    """Memory of a GPU that this process may still take, GB; None for a CPU."""
    return usable_gpu_bytes(device)[0] / 1e9 if device.type == "cuda" else None


@exclusive
def load_pipeline(editor: EditorSpec, mode: MemoryMode, device: Any, dtype: Any) -> Any:
    """Load the stock pipeline, quantised and placed as the mode says.

    Raises:
        FileNotFoundError, OSError, ValueError: what is missing, damaged or out of reach, in one line.
    """
    import diffusers

    layerwise = mode.bits == 4 and mode.offload == "group"
    quantised = quantisation_config(mode.bits, dtype) if mode.bits and not layerwise else {}
    location = locate(editor.repo)
    logger.info("loading %s (%s) from %s", editor.name, mode.name, location)
    if not Path(location).is_dir():
        hub_file(
            editor.repo, "model_index.json", revision=editor.revision
        )  # fails at once where the hub is away
    try:
        pipeline_class = getattr(diffusers, editor.pipeline_class)
        folder = Path(location)
        if not folder.is_dir():
            folder = Path(pipeline_class.download(location, revision=editor.revision, use_safetensors=True))
        pipe = pipeline_class.from_pretrained(folder, **load_models(folder, dtype, quantised))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise OSError(f"{editor.name} could not be loaded from {location}: {_first_line(error)}") from error
    if layerwise:
        quantise_to_4_bit(pipe.transformer, device, dtype)
        quantise_to_4_bit(pipe.text_encoder, device, dtype, ENCODER_KEPT)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    if mode.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif mode.offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)
    return pipe


def load_models(folder: Path, dtype: Any, quantised: Mapping[str, Any]) -> dict[str, Any]:
    """Every part of a pipeline that has weights, by its name in `model_index.json`, with no random tensor.

    Args:
        quantised: what quantises a part while it is loaded, by name.

    Raises:
        ValueError: missing, unexpected or mismatched tensors; OSError: missing or damaged files.
    """
    models = {}
    for name, entry in read_json(folder / "model_index.json").items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers"):
            continue
        model_class = getattr(importlib.import_module(library), str(class_name), None)
        if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
            continue  # tokenizer, processor, scheduler, or a name that the pipeline's own loader refuses
        options = {"quantization_config": quantised[name]} if name in quantised else {}
        # Told by `check_tensors` with their names; of quantised parts diffusers would drop every tensor.
        plain = not options and "quantization_config" not in read_json(folder / name / "config.json")
        with without_loading_reports():
            models[name], found = model_class.from_pretrained(
                folder / name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=plain,
                **options,
            )
        check_tensors(name, found)
    return models


@contextmanager
def out_of_memory_named(
    mode: MemoryMode, editor: EditorSpec, release: Callable[[], object] | None = None
) -> Iterator[None]:
    """Turn a lack of GPU memory into one line that names the mode that would fit; the process stays usable.

    Args:
        release: see `memory.freed_after_out_of_memory`.
    """
    with freed_after_out_of_memory(lambda: _advice(mode, editor), release):
        yield


def _advice(mode: MemoryMode, editor: EditorSpec) -> str:
    """What to do when a mode turned out too large: the preferred of the smaller ones first."""
    planned = editor if editor.transformer_params else EditorSpec("released", "", "")
    smaller = [other for other in MEMORY_MODES if other.gpu_gb(planned) < mode.gpu_gb(planned)]
    smaller.sort(key=lambda other: PREFERENCE.index(other.name))
    told = [
        f"{other.name} ({other.arguments}"
        + (f", about {other.gpu_gb(editor):.0f} GB)" if planned is editor else ")")
        for other in smaller
    ]
    said = f"the GPU ran out of memory in mode {mode.name}"
    if not told:
        return f"{said}, the smallest there is: close other programs on the GPU, or make a smaller image"
    others = f"; smaller still: {'; '.join(told[1:])}" if told[1:] else ""
    return f"{said}; this needs less: {told[0]}{others}"


def editor_revision(editor: EditorSpec) -> str:
    """The commit of a hub editor that is in the local cache, or `local:` and a digest of a folder's files."""
    location = Path(locate(editor.repo))
    if location.is_dir():
        files = [path for path in location.rglob("*") if path.suffix in (".json", ".safetensors")]
        return folder_digest(location, files)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(editor.repo, "model_index.json", revision=editor.revision)
    return Path(found).parent.name if isinstance(found, str) else "not cached"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
