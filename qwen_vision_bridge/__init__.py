"""Qwen Vision Bridge: Qwen3-VL's multi-level vision features in Qwen-Image-Edit.

Names are imported on first use, so that importing the package costs nothing: torch, transformers and
diffusers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bridge import BridgeConfig, VisionBridge
    from .cache import VisionCache
    from .extractor import VisionCacheExtractor
    from .pipeline import EnhancedQwenImageEdit
    from .specs import FAMILIES

__version__ = version("qwen-vision-bridge")
_HOME = {
    "BridgeConfig": "bridge",
    "EnhancedQwenImageEdit": "pipeline",
    "FAMILIES": "specs",
    "VisionBridge": "bridge",
    "VisionCache": "cache",
    "VisionCacheExtractor": "extractor",
}
__all__ = [
    "FAMILIES",
    "BridgeConfig",
    "EnhancedQwenImageEdit",
    "VisionBridge",
    "VisionCache",
    "VisionCacheExtractor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
