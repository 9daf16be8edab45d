"""Inject a bridge into a stock edit pipeline, or read and replace what its vision tower computes.

Outside the `with`, and after any exception inside it, the pipeline is bit-identical to stock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .bridge import VisionBridge, check_strength
from .cache import VisionCache
from .loading.locks import model_lock

if TYPE_CHECKING:
    from .patches import EditPipeline

Grids = tuple[tuple[int, int], ...]
Levels = Callable[[Tensor, Grids], VisionCache]
"""From the target tower's own output (N, D) and its grids to what a bridge takes for the source's levels."""
Site = Literal["tower", "deepstack"]
SITES: tuple[Site, ...] = get_args(Site)


class FeaturesNotReadError(RuntimeError):
    """The pipeline ran without reading the features that were injected."""


class LevelAttention(NamedTuple):
    """Attention of the bridge over the source's levels, token by token."""

    weights: Tensor
    """(N, L) on the CPU, summing to 1 over L; the images' tokens one after the other, each row by row."""
    grids: Grids
    """(gh, gw) of each image."""
    levels: tuple[str, ...]
    shares: Tensor | None = None
    """(N, L) on the CPU: the norm of each level's update over the sum of all levels'; 0 without an update."""

    def maps(self) -> list[np.ndarray]:
        """The weights, one (gh, gw, L) array an image."""
        return self._by_image(self.weights)

    def share_maps(self) -> list[np.ndarray]:
        """The shares of the update, one (gh, gw, L) array an image; empty where they were not recorded."""
        return [] if self.shares is None else self._by_image(self.shares)

    def _by_image(self, values: Tensor) -> list[np.ndarray]:
        parts = values.split([rows * columns for rows, columns in self.grids])
        return [part.reshape(*grid, -1).numpy() for part, grid in zip(parts, self.grids, strict=True)]


@dataclass
class Injection:
    """Record of what the target tower computed inside a `with`."""

    calls: int = 0
    """How often the pipeline read the features: once a prompt, positive and negative."""
    attention: LevelAttention | None = None
    """Of the first call; None where no bridge was injected."""
    grids: Grids = ()
    """(gh, gw) of each image the target tower saw."""
    baselines: list[Tensor] = field(default_factory=list)
    """The tower's own output of each call, (N, D), before the bridge."""


@contextmanager
def inject(
    pipe: EditPipeline,
    bridge: VisionBridge,
    source: VisionCache | Levels,
    strength: float = 1.0,
    site: Site = "tower",
) -> Iterator[Injection]:
    """Inject a bridge's features into a stock edit pipeline, for both prompts and every image.

    Args:
        pipe: a Qwen-Image-Edit pipeline of diffusers.
        bridge: is moved to the device of the features.
        source: the source's levels, on the grids the pipeline's own processor will use; or a function that
            makes levels of the target tower's own output, for controls.
        strength: scales the bridge's update; 0 leaves every bit as it is.
        site: `tower` replaces the target tower's output; `deepstack` adds each level's share of the update at
            the image tokens after the first language layers, as Qwen3-VL does.

    Raises:
        ValueError: an unknown site, a strength that is not finite, or a grid that differs from the source's.
        FeaturesNotReadError: on leaving, where the pipeline never ran its tower and no other error passes.
    """
    check_strength(strength)
    if site not in SITES:
        raise ValueError(f"site is one of {', '.join(SITES)}, not {site!r}")
    update = _Update(bridge, source, float(strength))
    with model_lock, ExitStack() as stack:
        if site == "tower":
            stack.enter_context(_tower_hook(pipe, update.replace))
        else:
            stack.enter_context(_tower_hook(pipe, update.split_by_level))
            stack.enter_context(_deepstack_hooks(pipe, update))
        yield update.record
    if update.record.calls == 0:
        raise FeaturesNotReadError(
            "the pipeline never ran its vision tower, so the bridge was not used and this is no enhanced "
            "image: prompt_embeds passed by hand or a replaced text encoder would do that"
        )


@contextmanager
def capture_vision(pipe: EditPipeline) -> Iterator[Injection]:
    """Record the target tower's output for every prompt and change nothing."""
    record = Injection()

    def capture(features: Tensor, grids: Grids) -> None:
        record.calls += 1
        record.grids = grids
        record.baselines.append(features.detach())

    with _tower_hook(pipe, capture):
        yield record


@contextmanager
def replace_vision(pipe: EditPipeline, features: Tensor) -> Iterator[None]:
    """Replace the target tower's output by other images' features, as `capture_vision` recorded them.

    Args:
        features: (N, D), on the grids that the pipeline's own processor will use.

    Raises:
        ValueError: the pipeline's own features have another shape.
        FeaturesNotReadError: on leaving, where the pipeline never ran its tower and no other error passes.
    """
    calls = 0

    def replace(own: Tensor, _grids: Grids) -> Tensor:
        nonlocal calls
        if own.shape != features.shape:
            raise ValueError(f"features are {tuple(features.shape)}, the pipeline's own {tuple(own.shape)}")
        calls += 1
        return features.to(own.device, own.dtype)

    with _tower_hook(pipe, replace):
        yield
    if not calls:
        raise FeaturesNotReadError("the pipeline never ran its vision tower: nothing was replaced")


class _Update:
    """The bridge's update in one pipeline call, shared by the hooks of a site."""

    def __init__(self, bridge: VisionBridge, source: VisionCache | Levels, strength: float) -> None:
        self.bridge, self.source, self.strength = bridge, source, strength
        self.record = Injection()
        self.at_image: Tensor | None = None  # (B, T) bool, of the running prompt
        self.parts: list[Tensor] = []  # L × (N, D), of the running prompt

    def replace(self, features: Tensor, grids: Grids) -> Tensor:
        """The bridge's output in place of the tower's, (N, D)."""
        output = self.bridge(self._levels(features, grids), features[None], self.strength)
        self._note(features, grids, output.level_weights, output.updates)
        return output.features[0]

    def split_by_level(self, features: Tensor, grids: Grids) -> None:
        """Keep each level's share of the update for the language layers; the tower's output stays."""
        parts, weights = self.bridge.contributions(self._levels(features, grids), features[None])
        self.parts = [self.strength * part[0] for part in parts]
        self._note(features, grids, weights, parts)

    def add_level(self, number: int, hidden: Tensor) -> Tensor:
        """Add one level's share at the image tokens of hidden states, (B, T, D)."""
        if self.strength == 0 or self.at_image is None:
            return hidden
        changed = hidden.clone()
        changed[self.at_image.to(hidden.device)] += self.parts[number].to(hidden.device, hidden.dtype)
        return changed

    def _levels(self, features: Tensor, grids: Grids) -> list[Tensor]:
        cache = self.source(features, grids) if callable(self.source) else self.source
        if grids != cache.grids:
            raise ValueError(
                f"the pipeline's vision tower works on the grids {grids}, the source features were made for "
                f"{cache.grids}: extract them for these grids"
            )
        self.bridge.to(features.device)
        return [cache.features[name].to(features.device) for name in self.bridge.config.levels]

    def _note(self, features: Tensor, grids: Grids, weights: Tensor, updates: Sequence[Tensor]) -> None:
        record = self.record
        if record.attention is None:
            first = weights[0].detach().float().cpu()
            norms = torch.stack([update[0].detach().float().norm(dim=-1) for update in updates], -1).cpu()
            shares = norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            record.attention = LevelAttention(first, grids, self.bridge.config.levels, shares)
        record.calls, record.grids = record.calls + 1, grids
        record.baselines.append(features.detach())


@contextmanager
def _tower_hook(pipe: EditPipeline, function: Callable[[Tensor, Grids], Tensor | None]) -> Iterator[None]:
    """Call `function` on every output (N, D) of the target tower, in image order, with its grids."""

    def hook(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        shapes = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        merge = tower.spatial_merge_size
        grids = tuple((rows // merge, columns // merge) for _, rows, columns in shapes.tolist())
        replacement = function(output.pooler_output, grids)
        if replacement is not None:
            output.pooler_output = replacement
        return output

    with model_lock:
        handle = pipe.text_encoder.model.visual.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _deepstack_hooks(pipe: EditPipeline, update: _Update) -> Iterator[None]:
    """Add the update's levels after the first language layers, one a layer, at the image tokens."""
    image_token = pipe.text_encoder.config.image_token_id

    def find_image_tokens(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        update.at_image = kwargs["input_ids"] == image_token

    def add_after(number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda _module, _args, hidden: update.add_level(number, hidden)

    layers = pipe.text_encoder.model.language_model.layers
    with ExitStack() as stack:
        handle = pipe.text_encoder.register_forward_pre_hook(find_image_tokens, with_kwargs=True)
        stack.callback(handle.remove)
        for number in range(len(update.bridge.config.levels)):
            stack.callback(layers[number].register_forward_hook(add_after(number)).remove)
        yield
