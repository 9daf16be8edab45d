"""Context managers that read, replace or correct what a stock pipeline computes: the only hooks here.

Outside the `with`, and after any exception inside it, the pipeline is bit-identical to stock.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .bridge import VisionBridge, check_strength
from .cache import VisionCache
from .loading.locks import model_lock, replaced
from .loading.tower_attention import VisionAttention, check_vision_attention, tower_attention

logger = logging.getLogger(__name__)

Grids = tuple[tuple[int, int], ...]
Levels = Callable[[torch.Tensor, Grids], VisionCache]
"""From the target tower's own output (N, D) and its grids to what a bridge takes for the source's levels."""
Site = Literal["tower", "deepstack", "prompt_embeds"]
SITES = ("tower", "deepstack", "prompt_embeds")

_announced: set[str] = set()


class FeaturesNotReadError(RuntimeError):
    """The pipeline ran and never read the features that were put in its way."""


@dataclass
class Injection:
    """What happened while a bridge was in a pipeline."""

    calls: int = 0
    """How often the pipeline read the features: once a prompt, positive and negative."""
    level_weights: torch.Tensor | None = None
    """(N, L) on the CPU, from the first call."""
    grids: Grids = ()
    """(gh, gw) of each image the target tower saw."""
    baselines: list[torch.Tensor] = field(default_factory=list)
    """The tower's own output of each call, (N, D), as it stood before the bridge."""


@contextmanager
def inject(
    pipe: Any, bridge: VisionBridge, cache: VisionCache | Levels, strength: float = 1.0, site: Site = "tower"
) -> Iterator[Injection]:
    """Let a stock edit pipeline see through a bridge, for both prompts and every image.

    Args:
        pipe: a Qwen-Image-Edit pipeline of diffusers.
        bridge: is moved to the device where the features are.
        cache: the source's levels, on the grids the pipeline's own processor will use; or a function that
            makes levels of the target tower's own output, for controls.
        strength: scales the bridge's update; 0 leaves every bit as it is.
        site: `tower` replaces the target tower's output; `deepstack` adds each level's share of the update at
            the image tokens behind the first language layers, as Qwen3-VL does; `prompt_embeds` adds the
            update at the image tokens of the finished embeddings.

    Raises:
        ValueError: an unknown site, a strength that is not finite, or a grid that differs from the cache's.
        FeaturesNotReadError: on leaving, where the pipeline never ran its tower and no other error passes.
    """
    check_strength(strength)
    if site not in SITES:
        raise ValueError(f"site is one of {', '.join(SITES)}, not {site!r}")
    record = Injection()
    state = _Update(bridge, cache, float(strength), record)
    with model_lock, ExitStack() as stack:
        if site == "tower":
            stack.enter_context(_tower_hook(pipe, state.replace))
        else:
            stack.enter_context(_tower_hook(pipe, state.observe))
            stack.enter_context(_image_positions(pipe, state))
            stack.enter_context(_late_sites(pipe, state, site))
        yield record
    if record.calls == 0:
        raise FeaturesNotReadError(
            "the pipeline never ran its vision tower, so the bridge was not used and this is no enhanced "
            "image: prompt_embeds given by hand or a replaced text encoder would do that"
        )


@contextmanager
def capture_vision(pipe: Any) -> Iterator[Injection]:
    """Read the target tower's output of every prompt, changing nothing."""
    record = Injection()

    def observe(features: torch.Tensor, grids: Grids) -> None:
        record.calls += 1
        record.grids = grids
        record.baselines.append(features.detach())

    with _tower_hook(pipe, observe):
        yield record


@contextmanager
def replace_vision(pipe: Any, features: torch.Tensor) -> Iterator[None]:
    """Show the text encoder other images' features, as `capture_vision` took them: a control that is blind.

    Args:
        features: (N, D), on the grids that the pipeline's own processor will use.

    Raises:
        ValueError: the pipeline's own features have another shape.
        FeaturesNotReadError: on leaving, where the pipeline never ran its tower and no other error passes.
    """
    calls = []

    def replace(own: torch.Tensor, _grids: Grids) -> torch.Tensor:
        if own.shape != features.shape:
            raise ValueError(f"features are {tuple(features.shape)}, the pipeline's own {tuple(own.shape)}")
        calls.append(1)
        return features.to(own.device, own.dtype)

    with _tower_hook(pipe, replace):
        yield
    if not calls:
        raise FeaturesNotReadError("the pipeline never ran its vision tower: nothing was replaced")


@contextmanager
def mrope_positions(pipe: Any, mode: Literal["fixed", "stock"] = "fixed") -> Iterator[None]:
    """Give the text encoder the token types that it needs to number image tokens along three axes.

    The edit pipelines of diffusers 0.42 drop the processor's `mm_token_type_ids`; transformers 5 then numbers
    image tokens along one axis, not the three the model was trained with (diffusers issue 14194). `fixed`
    adds them where they are missing, as the processor makes them; `stock` leaves the installed behaviour.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("fixed", "stock"):
        raise ValueError(f'mrope is "fixed" or "stock", not {mode!r}')
    if mode == "stock" or pipe.text_encoder is None:
        yield
        return
    config = pipe.text_encoder.config

    def add_token_types(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("image_grid_thw") is None or kwargs.get("mm_token_type_ids") is not None:
            return None
        _announce_once(
            "mrope", "image tokens get three-axis positions, which diffusers drops (mrope='stock' leaves it)"
        )
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return args, {**kwargs, "mm_token_type_ids": types}

    with model_lock:
        inner = pipe.text_encoder.model
        deltas = getattr(inner, "rope_deltas", None)
        handle = pipe.text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            inner.rope_deltas = deltas  # the encoder remembers the last prompt's offsets


@contextmanager
def batched_vision(pipe: Any, mode: VisionAttention = "batched") -> Iterator[None]:
    """Let the pipeline's target tower attend to all windows of a length at once, not to one after the other.

    The results are those of transformers' own loop up to rounding; `stock` leaves the loop.

    Raises:
        ValueError: an unknown mode.
    """
    if check_vision_attention(mode) == "stock" or pipe.text_encoder is None:
        yield
        return
    _announce_once(
        "attention", "vision towers attend in batches of windows (vision_attention='stock' leaves their loop)"
    )
    with tower_attention(pipe.text_encoder.model.visual, mode):
        yield


class _Update:
    """The bridge's work in one pipeline call, shared by the hooks of a site."""

    def __init__(
        self, bridge: VisionBridge, cache: VisionCache | Levels, strength: float, record: Injection
    ) -> None:
        self.bridge, self.cache, self.strength, self.record = bridge, cache, strength, record
        self.at_image: torch.Tensor | None = None  # (B, T) bool, of the running prompt
        self.parts: list[torch.Tensor] = []  # L × (N, D), of the running prompt

    def replace(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        levels = self._levels(features, grids)
        output = self.bridge(levels, features[None], self.strength)
        self._note(features, output.level_weights)
        return output.features[0]

    def observe(self, features: torch.Tensor, grids: Grids) -> None:
        parts, weights = self.bridge.contributions(self._levels(features, grids), features[None])
        self.parts = [self.strength * part[0] for part in parts]
        self._note(features, weights)

    def add_at_image(self, hidden: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Add (N, D) at the image tokens of (B, T, D)."""
        if self.strength == 0:
            return hidden
        changed = hidden.clone()
        positions = self.at_image.to(hidden.device)
        changed[positions] += update.to(hidden.device, hidden.dtype)
        return changed

    def _levels(self, features: torch.Tensor, grids: Grids) -> list[torch.Tensor]:
        cache = self.cache(features, grids) if callable(self.cache) else self.cache
        if grids != cache.grids:
            raise ValueError(
                f"the pipeline's vision tower works on the grids {grids}, the source features were made for "
                f"{cache.grids}: extract them for these grids"
            )
        self.bridge.to(features.device)
        self.record.grids = grids
        return [cache.features[name].to(features.device) for name in self.bridge.config.levels]

    def _note(self, features: torch.Tensor, weights: torch.Tensor) -> None:
        if self.record.calls == 0:
            self.record.level_weights = weights[0].detach().float().cpu()
        self.record.calls += 1
        self.record.baselines.append(features.detach())


@contextmanager
def shared_latents(pipe: Any) -> Iterator[None]:
    """Encode every reference image once for all calls inside the `with`; the images stay bit-identical.

    The pipelines take the mode of the VAE's distribution, so an image's latents are a function of its
    pixels alone.
    """
    known: dict[Any, torch.Tensor] = {}

    def encode(image: torch.Tensor, generator: Any) -> torch.Tensor:
        pixels = image.detach().cpu().contiguous()
        content = hashlib.sha256(pixels.view(torch.uint8).numpy()).hexdigest()
        key = (content, tuple(image.shape), image.dtype, image.device)
        if key not in known:
            known[key] = stock(image=image, generator=generator)
        return known[key]

    with model_lock:
        stock = pipe._encode_vae_image
        with replaced(pipe, _encode_vae_image=encode):
            yield


@contextmanager
def _tower_hook(pipe: Any, function: Callable[[torch.Tensor, Grids], torch.Tensor | None]) -> Iterator[None]:
    """Call `function` on every output (N, D) of the target tower, in image order, with its grids."""
    visual = pipe.text_encoder.model.visual

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        shapes = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        merge = module.spatial_merge_size
        grids = tuple((rows // merge, columns // merge) for _, rows, columns in shapes.tolist())
        replaced = function(output.pooler_output, grids)
        if replaced is not None:
            output.pooler_output = replaced
        return output

    with model_lock:
        handle = visual.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _image_positions(pipe: Any, state: _Update) -> Iterator[None]:
    """Remember where the image tokens of the running prompt are."""
    image_token = pipe.text_encoder.config.image_token_id

    def remember(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.at_image = kwargs["input_ids"] == image_token

    handle = pipe.text_encoder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _late_sites(pipe: Any, state: _Update, site: Site) -> Iterator[None]:
    """Add the update behind the first language layers, or to the finished embeddings."""

    def add_level(number: int) -> Callable[..., torch.Tensor]:
        return lambda _module, _args, output: state.add_at_image(output, state.parts[number])

    def add_all(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        update = torch.stack(state.parts).sum(0)
        output.hidden_states = (
            *output.hidden_states[:-1],
            state.add_at_image(output.hidden_states[-1], update),
        )
        return output

    handles = []
    if site == "prompt_embeds":
        handles.append(pipe.text_encoder.register_forward_hook(add_all))
    else:
        layers = pipe.text_encoder.model.language_model.layers
        for number in range(len(state.bridge.config.levels)):
            handles.append(layers[number].register_forward_hook(add_level(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _announce_once(key: str, message: str) -> None:
    if key not in _announced:
        _announced.add(key)
        logger.warning(message)
