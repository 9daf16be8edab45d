"""`VisionCacheExtractor`: images in, vision caches out, one model in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from .cache import CacheComparison, VisionCache, compare
from .environment import named_family
from .features import FeatureCache
from .images import ImageLike, image_digest, load_images, on_grids
from .loading.checkpoints import open_checkpoint
from .loading.checks import not_finite
from .loading.families import resolve_family
from .loading.locks import exclusive, model_lock
from .loading.memory import resolve_device, resolve_dtype
from .loading.token_grid import PixelLimits, pixel_limits, token_grid
from .loading.tower_attention import VisionAttention, check_vision_attention, tower_attention
from .loading.towers import compile_blocks, load_processor, load_tower, load_whole, require_cuda_for_8bit
from .specs import LEVEL_NAMES, Family, ModelSpec

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

Grid = tuple[int, int]
Features = dict[str, torch.Tensor]
Images = Sequence[Image.Image]
Role = Literal["qwen3", "qwen25"]
Scope = Literal["vision", "language"]
FEATURES_VERSION = "2"
"""Part of every key; raise it when equal models give other features than before."""


@dataclass(frozen=True)
class ExtractionOptions:
    """Rare settings of a `VisionCacheExtractor`."""

    language_layers: Sequence[int] | None = None
    """With `scope="language"`, after how many layers of the source early, mid and late are taken; None is a
    quarter, a half and three quarters of them."""
    vision_attention: VisionAttention = "batched"
    """`batched` lets the towers attend to many windows and images at once and fuses their layers on a GPU;
    `stock` keeps transformers' loop. Equal up to rounding."""
    compiled: bool = False
    """Let `torch.compile` fuse the towers' blocks: for many batches of one size. Equal up to rounding."""
    keep_models: bool = False
    """Keep both models in memory instead of freeing one when the other is loaded."""

    def __post_init__(self) -> None:
        check_vision_attention(self.vision_attention)


class VisionCacheExtractor:
    """Extract the vision features of Qwen3-VL (source) and Qwen2.5-VL (target) on one grid.

    Models are loaded at the first extraction; features found in the feature cache load none.

    Args:
        family: `"qwen"`, `"miniature"`, or a `Family`; `"auto"` is qwen where a GPU can run it.
        load_in_8bit: quantise with bitsandbytes (needs CUDA): the blocks of a tower, or with
            `scope="language"` the language model. None quantises a whole language model on CUDA and leaves a
            tower of 0.6 B parameters in 16 bits.
        device_map: `"auto"` places a model through accelerate over GPUs and CPU memory.
        device: of models and images; None is CUDA where there is one, else the CPU.
        dtype: a torch dtype or its name, such as `"bf16"`; None is bfloat16 on CUDA and float32 on a CPU.
        source, target: another registered model, hub id or local folder for that role.
        scope: `"vision"` runs the towers alone, whose features do not depend on the prompt; `"language"` runs
            the whole models and returns hidden states of the language model at the image tokens.
        feature_cache: keep features on disk: True for the default folder, a path for another, False for none.
        options, rare: rare settings, as an object or as keywords of their own.

    Raises:
        ValueError: an unknown family, model, scope or layer; 8-bit without CUDA.
    """

    def __init__(
        self,
        family: str | Family = "auto",
        load_in_8bit: bool | None = None,
        device_map: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        source: str | Path | None = None,
        target: str | Path | None = None,
        scope: Scope = "vision",
        feature_cache: bool | str | Path = True,
        options: ExtractionOptions | None = None,
        **rare: Any,
    ) -> None:
        self.family = resolve_family(named_family(family), source=source, target=target)
        if scope not in ("vision", "language"):
            raise ValueError(f'scope is "vision" or "language", not {scope!r}')
        self.scope, self.options = scope, replace(options or ExtractionOptions(), **rare)
        self.language_layers = _check_layers(self.options.language_layers, self.family.source.language_layers)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        if load_in_8bit:
            require_cuda_for_8bit(self.device)
        by_default = self.device.type == "cuda" and scope == "language"
        self.load_in_8bit, self.device_map = by_default if load_in_8bit is None else load_in_8bit, device_map
        folder = None if isinstance(feature_cache, bool) else feature_cache
        self.feature_cache = FeatureCache(folder) if feature_cache is not False else None
        self._specs: dict[Role, ModelSpec] = {"qwen3": self.family.source, "qwen25": self.family.target}
        self._models: dict[Role, PreTrainedModel] = {}
        self._processors: dict[str, Any] = {}
        self._revisions: dict[Role, str] = {}
        self._limits: PixelLimits | None = None  # of the target's processor

    def extract_qwen3_vision(
        self, image: ImageLike | Sequence[ImageLike], prompt: str = "", grids: Sequence[Grid] | None = None
    ) -> VisionCache:
        """Extract the source's levels on the target's grid, so that token i of both is the same place.

        Args:
            image: one image or several; several are packed on one axis, in order.
            prompt: changes the features with `scope="language"` only.
            grids: (gh, gw) of each image; None asks the target's own processor.

        Returns:
            A cache with `early`, `mid`, `late` and `merged` features, each (1, N, D): DeepStack's three
            outputs and the tower's own, or the hidden states that `source_states` gives.

        Raises:
            ValueError, TypeError, FileNotFoundError, OSError: as `load_images`, and of loading the model.
        """
        images = load_images(image, self.family.target.token_px)
        grids = [self.target_grid(image) for image in images] if grids is None else grids
        if len(grids) != len(images):
            raise ValueError(f"{len(images)} images need as many grids, got {len(grids)}")
        return self._cached("qwen3", images, prompt, grids)

    def extract_qwen25_vision(
        self, image: ImageLike | Sequence[ImageLike], prompt: str = "", grids: Sequence[Grid] | None = None
    ) -> VisionCache:
        """Extract the target's features, as its own processor and tower give them: the baseline.

        Arguments and errors are those of `extract_qwen3_vision`; `grids` are for `scope="vision"` only.

        Returns:
            A cache with `vision` features (1, N, D): the merged output of the tower, or with
            `scope="language"` the last hidden state (after the final norm) at the image tokens.
        """
        images = load_images(image, self.family.target.token_px)
        if grids is not None:
            images = on_grids(images, grids, self.family.target.token_px)
        else:
            grids = [self.target_grid(image) for image in images]
        return self._cached("qwen25", images, prompt, grids)

    @exclusive
    def extract_batch(self, role: Role, images: Images, grids: Sequence[Grid]) -> list[VisionCache]:
        """Run many images through one tower at once, past the feature cache; one cache an image.

        Raises:
            ValueError: with `scope="language"`, whose features depend on a prompt.
        """
        if self.scope != "vision":
            raise ValueError('batches need scope="vision": the language model reads one prompt at a time')
        features = self._run(role, images, "", grids)
        return VisionCache(features, tuple(grids), self.provenance(role)).split()

    def compare_caches(self, qwen3_cache: VisionCache, qwen25_cache: VisionCache) -> CacheComparison:
        """Compare token counts and dimensions, and each level's mean, spread, CKA and outliers."""
        return compare(qwen3_cache, qwen25_cache)

    def target_grid(self, image: Image.Image) -> Grid:
        """(gh, gw) that the target's own processor gives an image; needs no weights."""
        if self._limits is None:
            self._limits = pixel_limits(self.family.target)
        return token_grid(image.width, image.height, self.family.target.token_px, self._limits)

    def provenance(self, role: Role) -> dict[str, str]:
        """Everything about the models that decides the features of an image."""
        spec, options = self._specs[role], self.options
        return {
            "model": spec.name,
            "repo": spec.repo,
            "revision": self.revision(role),
            "scope": self.scope,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantisation": "int8" if self.load_in_8bit else "none",
            "device": self.device.type,
            "features_version": FEATURES_VERSION,
            "vision_attention": options.vision_attention + (", compiled" if options.compiled else ""),
            **({"language_layers": str(self.language_layers)} if self.scope == "language" else {}),
        }

    def revision(self, role: Role) -> str:
        """The commit of a hub model, or a digest of a local folder."""
        if role not in self._revisions:
            self._revisions[role] = open_checkpoint(self._specs[role]).revision
        return self._revisions[role]

    def warm(self, role: Role) -> None:
        """Load a model before the first image needs it."""
        self._model(role)

    @exclusive
    def unload(self, model: Role | None = None) -> None:
        """Free a model's memory, or both; the next extraction loads it again."""
        roles = [role for role in self._models if model in (None, role)]
        for role in roles:
            del self._models[role]
        if roles and self.device.type == "cuda":
            gc.collect()  # models that accelerate placed hold cycles; on a CPU counting references is enough
            torch.cuda.empty_cache()

    # Notebooks write `del extractor._qwen3_model` to free it.
    _qwen3_model = property(lambda self: self._models.get("qwen3"), None, lambda self: self.unload("qwen3"))
    _qwen25_model = property(
        lambda self: self._models.get("qwen25"), None, lambda self: self.unload("qwen25")
    )

    @exclusive
    def _cached(self, role: Role, images: Images, prompt: str, grids: Sequence[Grid]) -> VisionCache:
        """Features from the feature cache, or from the model and into it."""
        provenance = self.provenance(role) | {"images": " ".join(map(image_digest, images))}
        if self.scope == "language":
            provenance["prompt"] = prompt
        cache = VisionCache({}, tuple(grids), provenance)
        if self.feature_cache and (shard := self.feature_cache.get(cache.header)):
            return VisionCache.from_shard(shard).to(self.device)
        cache = replace(cache, features=self._run(role, images, prompt, grids))
        if self.feature_cache:
            try:
                self.feature_cache.put(cache.header, cache.features)
            except OSError as error:  # a full disk, say: the features themselves are fine
                logger.warning("these features were not cached: %s", error)
        return cache

    def _run(self, role: Role, images: Images, prompt: str, grids: Sequence[Grid]) -> Features:
        """Features (1, N, D) by name; NaN and infinity, which give black images, are refused."""
        model = self._model(role)
        tower = model.get_submodule("model.visual") if self.scope == "language" else model
        run = self._run_source if role == "qwen3" else self._run_target
        with torch.inference_mode(), tower_attention(tower, self.options.vision_attention):
            features = run(images, prompt, grids)
        if not torch.stack([torch.isfinite(value).all() for value in features.values()]).all():
            raise not_finite(f"the features of {self._specs[role].name}", {self._specs[role].name: model})
        return {name: value[None] for name, value in features.items()}

    def _run_source(self, images: Images, prompt: str, grids: Sequence[Grid]) -> Features:
        locked, model = on_grids(images, grids, self.family.source.token_px), self._model("qwen3")
        if self.scope == "language":
            inputs = self._language_inputs("qwen3", locked, prompt, do_resize=False)
            return source_states(model, inputs, self.language_layers)
        output = model(*self._tower_inputs("qwen3", locked, do_resize=False))
        levels = dict(zip(LEVEL_NAMES, output.deepstack_features, strict=True))  # each (N, D), image order
        return {**levels, "merged": output.pooler_output}

    def _run_target(self, images: Images, prompt: str, grids: Sequence[Grid]) -> Features:
        model = self._model("qwen25")
        if self.scope == "language":
            inputs = self._language_inputs("qwen25", images, prompt)
            output = model.get_submodule("model")(**inputs)
            features = output.last_hidden_state[inputs["input_ids"] == model.config.image_token_id]  # (N, D)
        else:
            px = self.family.target.token_px
            exact = [(rows * px, columns * px) for rows, columns in grids]
            fits = exact == [(image.height, image.width) for image in images]
            output = model(*self._tower_inputs("qwen25", images, do_resize=not fits))
            features = output.pooler_output  # (N, D) in image order; last_hidden_state is in window order
        if len(features) != sum(rows * columns for rows, columns in grids):
            raise RuntimeError(f"{self.family.target.name} gave {len(features)} tokens for the grids {grids}")
        return {"vision": features}

    def _tower_inputs(self, role: Role, images: Images, do_resize: bool) -> tuple[torch.Tensor, ...]:
        """Patches (P, C) and each image's shape (images, 3) in patches."""
        inputs = self._image_processor(role)(images=list(images), do_resize=do_resize, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        return pixels, inputs["image_grid_thw"].to(self.device)

    def _language_inputs(self, role: Role, images: Images, prompt: str, **options: bool) -> BatchFeature:
        processor = self._processor(role)
        # Attention is causal: behind the images the prompt could not change their states.
        content = [{"type": "text", "text": prompt}, *({"type": "image"} for _ in images)]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=list(images), return_tensors="pt", **options).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return inputs

    @exclusive
    def _model(self, role: Role) -> PreTrainedModel:
        if role not in self._models:
            if not self.options.keep_models:
                self.unload()
            placement = (self.device, self.dtype, self.load_in_8bit, self.device_map)
            if self.scope == "language":
                self._models[role] = load_whole(self._specs[role], *placement)
            else:
                self._models[role] = load_tower(self._specs[role], *placement).model
                if self.options.compiled:
                    compile_blocks(self._models[role])
        return self._models[role]

    def _image_processor(self, role: Role) -> BaseImageProcessor:
        return self._processor(role, images_only=True)

    def _processor(self, role: Role, images_only: bool = False) -> Any:
        key = f"{role}:{images_only}"
        if key not in self._processors:  # locked for loading only: reader threads ask image by image
            spec = self._specs[role]
            with model_lock:
                self._processors[key] = load_processor(
                    spec.repo, spec.processor_subfolder, spec.revision, images_only
                )
        return self._processors[key]


def source_states(model: PreTrainedModel, inputs: BatchFeature, layers: Sequence[int]) -> Features:
    """Hidden states of a whole Qwen3-VL at the image tokens, each (N, D) in image order.

    `early`, `mid` and `late` are taken after that many layers (and after the DeepStack adds), `merged` after
    the final norm.
    """
    at_image = inputs["input_ids"] == model.config.image_token_id  # (1, T)
    core = model.get_submodule("model")
    tower = core.get_submodule("visual")(inputs["pixel_values"], inputs["image_grid_thw"])
    states = core(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    features = {}
    for name, layer in zip(LEVEL_NAMES, layers, strict=True):
        features[name] = states[layer][at_image]  # (N, D), as the layer left it
        # The first layers' outputs are recorded before DeepStack adds its level to them.
        if layer <= len(tower.deepstack_features) and layer < len(states) - 1:
            features[name] = features[name] + tower.deepstack_features[layer - 1].to(features[name].dtype)
    return {**features, "merged": states[-1][at_image]}


def _check_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(-(-depth * quarter // 4) for quarter in (1, 2, 3))
    layers = tuple(layers)
    rising = sorted(set(layers)) == list(layers)
    if len(layers) != len(LEVEL_NAMES) or not rising or not 1 <= layers[0] <= layers[-1] <= depth:
        raise ValueError(f"language_layers are three rising numbers from 1 to {depth}, not {layers}")
    return layers
