"""Qwen Vision Bridge: Qwen3-VL's multi-level vision features in Qwen-Image-Edit.

| name | what it is |
| --- | --- |
| `EnhancedQwenImageEdit` | Qwen-Image-Edit with the bridge inside: `generate`, `compare` |
| `VisionCacheExtractor` | vision features of an image from Qwen3-VL and Qwen2.5-VL, on one grid |
| `VisionCache` | those features, with grids and provenance |
| `VisionBridge`, `BridgeConfig` | the trained map from Qwen3-VL's levels to Qwen2.5-VL's features |
| `ExtractionOptions` | rare settings of the extractor |
| `FAMILIES` | models that belong together, by name: `miniature`, `qwen` |

Names are imported on first use, because torch, transformers and diffusers take seconds.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bridge import BridgeConfig, VisionBridge
    from .cache import VisionCache
    from .extractor import ExtractionOptions, VisionCacheExtractor
    from .loading.registry import FAMILIES
    from .pipeline import EnhancedQwenImageEdit

# PyTorch's threads spin while they wait, which makes an edit on a busy machine ten times slower; torch reads
# this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_MODULES = {
    "BridgeConfig": "bridge",
    "EnhancedQwenImageEdit": "pipeline",
    "ExtractionOptions": "extractor",
    "FAMILIES": "loading.registry",
    "VisionBridge": "bridge",
    "VisionCache": "cache",
    "VisionCacheExtractor": "extractor",
}
__all__ = [
    "FAMILIES",
    "BridgeConfig",
    "EnhancedQwenImageEdit",
    "ExtractionOptions",
    "VisionBridge",
    "VisionCache",
    "VisionCacheExtractor",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from .io import version_of

        return version_of("qwen-vision-bridge")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
