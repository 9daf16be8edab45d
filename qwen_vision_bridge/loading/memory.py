"""GPU memory: the modes that fit an editor into it, plans that name what lies where, and running out of it.

The sizes of modes and plans are estimates in 10⁹ bytes from parameter counts, at 1024² with one reference
image. Nothing here imports torch before it is called.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..specs import EditorSpec, Family

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Offload = Literal["model", "group", "sequential"]
WORKING_GB = 6.0  # activations, VAE decoding and the CUDA context at 1024²
TOWER_GB = 1.2  # the source's tower in 16 bits
BYTES = {None: 2.0, 8: 1.05, 4: 0.58}  # a parameter's bytes by bits, with the scales that quantisation adds
UNQUANTISED_ENCODER_B = 1.77  # of the text encoder: tower and embeddings, which stay in 16 bits
CARDS_GB = (80, 48, 24, 16, 12)
PLACES: dict[Offload | None, str] = {
    None: "on the GPU",
    "model": "in CPU memory, on the GPU while it works",
    "group": "in CPU memory, layer by layer on the GPU, the next one on its way",
    "sequential": "in CPU memory, layer by layer on the GPU",
}
OUT_OF_MEMORY_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class GpuMemoryError(OSError):
    """The GPU cannot hold what was asked for."""


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
        words = [f"load_in_{self.bits}bit=True"] if self.bits else []
        words += [f'offload="{self.offload}"'] if self.offload else []
        return ", ".join(words) or "none"

    def part_sizes(self, editor: EditorSpec) -> tuple[float, float]:
        """GB of the DiT's weights and of the text encoder's."""
        kept = min(UNQUANTISED_ENCODER_B, editor.encoder_params)
        encoder = (editor.encoder_params - kept) * BYTES[self.bits] + kept * 2.0
        return editor.transformer_params * BYTES[self.bits], encoder

    def weights_gb(self, editor: EditorSpec) -> float:
        """GB of all weights: what an offloading mode keeps in CPU memory."""
        return sum(self.part_sizes(editor))

    def peak_gb(self, editor: EditorSpec) -> float:
        """Estimated peak on the GPU in GB, the source's tower not counted."""
        transformer, encoder = self.part_sizes(editor)
        if self.offload is None:
            return transformer + encoder + WORKING_GB
        if self.offload == "model":
            return max(transformer, encoder) + WORKING_GB
        return WORKING_GB + (2.0 if self.offload == "group" else 0.5)


MEMORY_MODES = (  # in order of preference: the first that fits is recommended
    MemoryMode("plain"),
    MemoryMode("8-bit", bits=8),
    MemoryMode("model offload", offload="model"),
    MemoryMode("8-bit + model offload", bits=8, offload="model"),
    MemoryMode("4-bit", bits=4),
    MemoryMode("4-bit + model offload", bits=4, offload="model"),
    MemoryMode("4-bit + group offload", bits=4, offload="group"),
    MemoryMode("group offload", offload="group"),
    MemoryMode("sequential offload", offload="sequential"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """One mode for one family on one GPU."""

    mode: MemoryMode
    family: Family
    gpu_gb: float
    """Memory of the GPU that may be used."""

    @property
    def peak_gb(self) -> float:
        """Estimated peak on the GPU, the source's tower not counted."""
        return self.mode.peak_gb(self.family.editor)

    @property
    def keeps_source(self) -> bool:
        """Whether the source's tower may stay on the GPU while the transformer works."""
        return self.mode.offload is None and self.peak_gb + TOWER_GB <= self.gpu_gb

    def lines(self) -> list[str]:
        """The plan in words, one part a line."""
        transformer, encoder = self.mode.part_sizes(self.family.editor)
        bits = f"{self.mode.bits}-bit" if self.mode.bits else "bf16"
        place = PLACES[self.mode.offload]
        tower = "kept on the GPU" if self.keeps_source else "on the GPU before the edit, then freed"
        head = f"Memory plan for {self.gpu_gb:.0f} GB: {self.mode.name} ({self.mode.arguments})"
        return [
            f"{head}, about {self.peak_gb:.0f} GB at the peak (estimates)",
            f"  source tower   {TOWER_GB:5.1f} GB, bf16, {tower}",
            f"  text encoder   {encoder:5.1f} GB, {bits} (its tower bf16), {place}",
            f"  transformer    {transformer:5.1f} GB, {bits}, {place}",
            f"  working space  {WORKING_GB:5.1f} GB",
        ]


def plan_for(family: Family, gpu_gb: float, ram_gb: float) -> MemoryPlan | None:
    """The plan of the preferred mode that fits, or None; what is offloaded has to fit into CPU memory."""
    for mode in MEMORY_MODES:
        fits_ram = not mode.offload or mode.weights_gb(family.editor) <= ram_gb
        if fits_ram and mode.peak_gb(family.editor) <= gpu_gb:
            return MemoryPlan(mode, family, gpu_gb)
    return None


def log_plan(plan: MemoryPlan, device: torch.device) -> None:
    """Log a plan for a GPU, unless the models are too small to plan for."""
    if device.type == "cuda" and plan.family.editor.transformer_params:
        for line in plan.lines():
            logger.info(line)


def find_mode(load_in_8bit: bool, load_in_4bit: bool, offload: str | None) -> MemoryMode:
    """The mode of these arguments.

    Raises:
        ValueError: both quantisations, an unknown offload, or a pair that the libraries do not support.
    """
    if load_in_8bit and load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other: choose one")
    if offload is not None and offload not in get_args(Offload):
        raise ValueError(f"offload is one of {', '.join(get_args(Offload))} or None, not {offload!r}")
    bits = 8 if load_in_8bit else 4 if load_in_4bit else None
    for mode in MEMORY_MODES:
        if (mode.bits, mode.offload) == (bits, offload):
            return mode
    fitting = [str(mode.offload) for mode in MEMORY_MODES if mode.bits == bits]
    raise ValueError(f"{bits}-bit weights go with offload {', '.join(fitting)}, not with {offload!r}")


def check_device(mode: MemoryMode, device: torch.device | str, family: Family, free_gb: float | None) -> None:
    """Refuse a mode that the device cannot run, before anything is loaded.

    Args:
        free_gb: free memory of the GPU; None on a CPU.

    Raises:
        ValueError: quantisation or offload without CUDA.
        GpuMemoryError: too little memory; the message names the modes that would fit with their needs.
    """
    if free_gb is None:
        if mode.bits or mode.offload:
            raise ValueError(
                f"{mode.name} ({mode.arguments}) needs a CUDA device, the pipeline would run on {device}: "
                "leave these arguments out, or use a machine with an NVIDIA GPU"
            )
        return
    need = mode.peak_gb(family.editor)
    if not family.editor.transformer_params or need <= free_gb:
        return
    fitting = "; ".join(
        f"{other.name} ≈ {other.peak_gb(family.editor):.0f} GB ({other.arguments})"
        for other in MEMORY_MODES
        if other.peak_gb(family.editor) <= free_gb
    )
    no_mode = "no mode fits: use --models miniature or a larger GPU"
    raise GpuMemoryError(
        f"{mode.name} needs about {need:.0f} GB of GPU memory, {free_gb:.1f} GB are free; "
        + (f"these would fit: {fitting}" if fitting else no_mode)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's lack of memory: torch's own, or a RuntimeError that says so."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; the name spares importing torch
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


@contextmanager
def out_of_memory_as(
    message: Callable[[], str], release: Callable[[], object] | None = None
) -> Iterator[None]:
    """Turn a lack of GPU memory inside the `with` into a GpuMemoryError that holds no tensor.

    An error keeps its frames, and they keep every tensor of the call that failed; so the frames are emptied
    before memory is given back and the new error is raised.

    Args:
        message: text of the error; called after memory was given back, so that it can report what is free.
        release: gives back what outlives the call, such as models that offloading left on the GPU.
    """
    failed = False
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        failed = True
    if failed:
        if release is not None:
            release()
        free_cuda()
        raise GpuMemoryError(message())


@contextmanager
def smaller_mode_suggested(
    mode: MemoryMode, editor: EditorSpec, release: Callable[[], object] | None = None
) -> Iterator[None]:
    """Turn a lack of GPU memory into one line that names smaller modes; the process stays usable.

    Args:
        release: see `out_of_memory_as`.
    """
    with out_of_memory_as(lambda: _advice(mode, editor), release):
        yield


def _advice(mode: MemoryMode, editor: EditorSpec) -> str:
    """Suggest the smaller modes, the preferred one first."""
    is_planned = bool(editor.transformer_params)
    sized = editor if is_planned else EditorSpec("released", "", "")
    smaller = [
        f"{other.name} ({other.arguments}"
        + (f", about {other.peak_gb(editor):.0f} GB)" if is_planned else ")")
        for other in MEMORY_MODES
        if other.peak_gb(sized) < mode.peak_gb(sized)
    ]
    failure = f"the GPU ran out of memory in mode {mode.name}"
    if not smaller:
        return f"{failure}, the smallest there is: close other programs on the GPU, or use a smaller image"
    others = f"; smaller still: {'; '.join(smaller[1:])}" if smaller[1:] else ""
    return f"{failure}; this needs less: {smaller[0]}{others}"


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device that a user names; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: neither a CPU nor a CUDA device of this machine.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device is "cpu", "cuda" or "cuda:0", not {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f'device is "cpu", "cuda" or "cuda:0", not {device!r}: nothing else was tested')
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not there: this machine has {torch.cuda.device_count()} "
            'CUDA devices; device="cpu" runs family="miniature"'
        )
    return found


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype that a user names; None is bfloat16 on CUDA and float32 on a CPU.

    Raises:
        ValueError: no floating-point dtype of 16 or 32 bits.
    """
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if (name := DTYPES.get(name, name)) not in DTYPES.values():
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, or such a torch.dtype, not {dtype!r}")
    return getattr(torch, name)


def device_name(device: torch.device | str, threads: bool = True) -> str:
    """Name a device as results files do: "NVIDIA H100 80GB HBM3", or "CPU, 2 threads".

    Args:
        threads: whether a CPU's number of threads belongs to the name.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' if count > 1 else ''}" if threads else "CPU"


def usable_gpu_bytes(device: torch.device) -> tuple[float, float]:
    """Bytes of a GPU that this process may still take, and may take in all.

    A cap set with `torch.cuda.set_per_process_memory_fraction` counts.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    cap = total * torch.cuda.get_per_process_memory_fraction(device.index)  # None is the current one
    return min(free, cap - torch.cuda.memory_reserved(device)), cap


def free_gpu_gb(device: torch.device) -> float | None:
    """Memory of a GPU that this process may still take, GB; None for a CPU."""
    return usable_gpu_bytes(device)[0] / 1e9 if device.type == "cuda" else None


def total_gpu_gb(device: torch.device) -> float:
    """Memory of a GPU that this process may use in all, GB; 0 for a CPU."""
    return usable_gpu_bytes(device)[1] / 1e9 if device.type == "cuda" else 0.0


def free_cuda() -> None:
    """Give unused GPU memory back, that of reference cycles included; without CUDA only the cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
