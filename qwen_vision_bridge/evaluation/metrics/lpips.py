"""LPIPS, where the weights of its network are on disk already: nothing is downloaded for it.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018, version 0.1, by torchmetrics (the `lpips` extra), which carries the linear layers. The network
beneath is torchvision's, from the folder that torch.hub keeps.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .ocr import ImageOrArray
from .pixels import same_size

WEIGHTS = {"alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
"""File of each network; PIE-Bench measures with `squeeze`."""


def lpips_missing(net: str) -> str:
    """Why LPIPS cannot be measured with a network of `WEIGHTS`; "" where it can."""
    if find_spec("torchmetrics") is None:
        return "torchmetrics is not installed (the extra `lpips`)"
    path = _checkpoints() / WEIGHTS[net]
    return "" if path.is_file() else f"no {WEIGHTS[net]} in {path.parent}"


def lpips(a: ImageOrArray, b: ImageOrArray, net: str = "alex", mask: np.ndarray | None = None) -> float:
    """The distance of two images, 0 for equal ones.

    With a mask, bool (H, W), both are made black outside it first, as PIE-Bench does: what is black in both
    adds nothing but its rim.

    Raises:
        ValueError: images of different sizes, or a network whose weights are not here.
    """
    if why := lpips_missing(net):
        raise ValueError(f"LPIPS cannot be measured: {why}")
    import torch

    planes = []
    for pixels in same_size(a, b):
        shown = pixels if mask is None else np.where(mask[..., None], pixels, 0)
        planes.append(torch.from_numpy(shown.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None])
    with torch.no_grad():
        return float(_network(net)(*planes).squeeze())


@lru_cache(maxsize=2)
def _network(net: str) -> Any:
    from accelerate.utils import patch_environment
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    # Torch takes nothing but tensors out of a file, whatever the library between asks for.
    with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        return _NoTrainLpips(net=net)


def _checkpoints() -> Path:
    """As torch.hub finds it, without importing torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch"
    return Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub" / "checkpoints"
