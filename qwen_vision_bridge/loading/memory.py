"""Out of GPU memory: told from other errors, cleaned up after, and said in one line."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class GpuMemoryError(OSError):
    """The GPU cannot hold what was asked for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's lack of memory: torch's own, or a RuntimeError that says so."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; the name spares importing torch
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def freed_after_out_of_memory(
    message: Callable[[], str], release: Callable[[], object] | None = None
) -> Iterator[None]:
    """Turn a lack of GPU memory inside the `with` into a GpuMemoryError that holds no tensor.

    An error keeps its frames, and they keep every tensor of the call that failed; so the frames are emptied
    before memory is given back and the new error is raised.

    Args:
        message: what to say; called after the memory was given back, so that it may look at what is free.
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


def usable_gpu_bytes(device: torch.device) -> tuple[float, float]:
    """Bytes of a GPU that this process may still take, and may take in all.

    A cap set with `torch.cuda.set_per_process_memory_fraction` counts.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    cap = total * torch.cuda.get_per_process_memory_fraction(device.index)  # None is the current one
    return min(free, cap - torch.cuda.memory_reserved(device)), cap


def free_cuda() -> None:
    """Give unused GPU memory back, that of reference cycles included; without CUDA only the cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
