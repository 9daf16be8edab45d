"""`VisionCacheExtractor`: images in, vision caches out, one model in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from .cache import CacheComparison, VisionCache, compare
from .features import FeatureCache
from .images import ImageLike, image_digest, load_images, on_grids
from .loading.checkpoints import not_finite, open_checkpoint
from .loading.locks import exclusive, model_lock
from .loading.processors import load_processor
from .loading.tower_attention import VisionAttention, check_vision_attention, tower_attention
from .loading.towers import compile_blocks, load_tower, load_whole, require_cuda_for_8bit
from .specs import LEVEL_NAMES, Family, ModelSpec, resolve_family
from .states import source_states

logger = logging.getLogger(__name__)

Grid = tuple[int, int]
Role = Literal["qwen3", "qwen25"]
Scope = Literal["vision", "language"]
FEATURES_VERSION = "2"
"""Raised when equal models give other features than before, so that kept ones are not taken for them. Since 2
rotary frequencies keep 32 bits in 16-bit towers, and on GPUs their layers are fused."""


class VisionCacheExtractor:
    """Extract the vision features of Qwen3-VL (source) and Qwen2.5-VL (target) on one and the same grid.

    Nothing is loaded until the first extraction, and features found in the feature cache load no model at
    all. Loading one model frees the other unless `keep_models` is set.

    Args:
        family: `"qwen"`, `"miniature"`, or a `Family`.
        load_in_8bit: quantise with bitsandbytes (needs CUDA): the blocks of a tower, or for
            `scope="language"` the language model. None does it where it is worth it, which is a whole
            language model on CUDA: a tower of 0.6 B parameters stays in 16 bits.
        device_map: `"auto"` places a model through accelerate over GPUs and CPU memory.
        device: where models and images go; None is CUDA where there is one, else the CPU.
        dtype: None is bfloat16 on CUDA and float32 on a CPU.
        source, target: another registered model, hub id or local folder for that role.
        scope: `"vision"` runs the towers alone, and the prompt does not change their features; `"language"`
            runs the whole models and returns the hidden states of the language model at the image tokens,
            prompt included.
        language_layers: for `scope="language"`, after how many layers of the source the early, mid and late
            levels are taken; None is a quarter, a half and three quarters of them.
        vision_attention: `"batched"` lets the towers attend to many windows and images at once, and fuses
            their layers on a GPU, `"stock"` leaves transformers' loop; equal up to rounding.
        compiled: let `torch.compile` fuse the towers' blocks: for many batches of one size, slow to begin
            with, equal up to rounding.
        feature_cache: keep features on disk: True for the default folder, a path for another, False for none.
        keep_models: let both models stay in memory.

    Raises:
        ValueError: an unknown family, model, scope or layer; 8-bit without CUDA.
    """

    def __init__(
        self,
        family: str | Family = "qwen",
        load_in_8bit: bool | None = None,
        device_map: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        source: str | Path | None = None,
        target: str | Path | None = None,
        scope: Scope = "vision",
        language_layers: Sequence[int] | None = None,
        vision_attention: VisionAttention = "batched",
        compiled: bool = False,
        feature_cache: bool | str | Path = True,
        keep_models: bool = False,
    ) -> None:
        self.family = resolve_family(family, source=source, target=target)
        if scope not in ("vision", "language"):
            raise ValueError(f'scope is "vision" or "language", not {scope!r}')
        self.scope, self.vision_attention = scope, check_vision_attention(vision_attention)
        self.compiled = compiled
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if load_in_8bit:
            require_cuda_for_8bit(self.device)
        self.load_in_8bit = (
            self.device.type == "cuda" and scope == "language" if load_in_8bit is None else load_in_8bit
        )
        self.device_map = device_map
        self.language_layers = _checked_layers(language_layers, self.family.source.language_layers)
        folder = None if isinstance(feature_cache, bool) else feature_cache
        self.feature_cache = FeatureCache(folder) if feature_cache is not False else None
        self.keep_models = keep_models
        self._models: dict[str, Any] = {}
        self._processors: dict[str, Any] = {}
        self._revisions: dict[str, str] = {}

    def extract_qwen3_vision(
        self, image: ImageLike | Sequence[ImageLike], prompt: str = "", grids: Sequence[Grid] | None = None
    ) -> VisionCache:
        """The source's levels, on the target's grid.

        Each image is resized to (gh·px, gw·px), px the side of one source token, so that token i of source
        and target is the same place (grid lock).

        Args:
            image: one image or several; several are packed on one axis, in order.
            prompt: changes the features with `scope="language"` only; the towers never see it.
            grids: (gh, gw) of each image; None asks the target's own processor.

        Returns:
            A cache with `early`, `mid`, `late` and `merged` features, each (1, N, D): with `scope="vision"`
            DeepStack's three outputs and the tower's merged output, with `scope="language"` hidden states of
            three layers (after the DeepStack adds) and of the last one (after the final norm).

        Raises:
            ValueError, TypeError, FileNotFoundError, OSError: as `load_images`, and of loading the model.
        """
        images = load_images(image, self.family.target.token_px)
        grids = tuple(grids) if grids is not None else tuple(self.target_grid(image) for image in images)
        if len(grids) != len(images):
            raise ValueError(f"{len(images)} images need as many grids, got {len(grids)}")
        return self._cached("qwen3", images, prompt, grids, self._run_source)

    def extract_qwen25_vision(
        self, image: ImageLike | Sequence[ImageLike], prompt: str = "", grids: Sequence[Grid] | None = None
    ) -> VisionCache:
        """The target's features, as its own processor and tower make them: the baseline.

        Args:
            image: one image or several; several are packed on one axis, in order.
            prompt: changes the features with `scope="language"` only; the tower never sees it.
            grids: (gh, gw) of each image, which is resized to it; None is what the processor gives. With
                `scope="vision"` only.

        Returns:
            A cache with `vision` features (1, N, D), in image order: the merged output of the tower, or
            with `scope="language"` the last hidden state (after the final norm) at the image tokens.

        Raises:
            ValueError, TypeError, FileNotFoundError, OSError: as `load_images`, and of loading the model.
        """
        images = load_images(image, self.family.target.token_px)
        if grids is not None:
            images = on_grids(images, grids, self.family.target.token_px)
        else:
            grids = [self.target_grid(image) for image in images]
        return self._cached("qwen25", images, prompt, tuple(grids), self._run_target)

    @exclusive
    def extract_batch(
        self, role: Role, images: Sequence[Image.Image], grids: Sequence[Grid]
    ) -> list[VisionCache]:
        """Many images through one tower in one go, past the feature cache: a cache an image.

        Args:
            role: which tower.
            images: as `load_images` gives them.
            grids: (gh, gw) of each, as `target_grid` says.

        Raises:
            ValueError: with `scope="language"`, whose features hang on a prompt.
        """
        if self.scope != "vision":
            raise ValueError('batches are for scope="vision": the language model reads one prompt at a time')
        run = self._run_source if role == "qwen3" else self._run_target
        with tower_attention(self._model(role), self.vision_attention):
            features = run(list(images), "", tuple(grids))
        self._check_finite(role, features)
        packed = {name: value[None] for name, value in features.items()}
        return VisionCache(packed, tuple(grids), self.provenance(role)).split()

    def provenance(self, role: Role) -> dict[str, str]:
        """Everything about the models that decides the features of an image."""
        made = self._provenance(role, [], "")
        return {key: value for key, value in made.items() if key != "images"}

    def warm(self, role: Role) -> None:
        """Load a model now and not at the first image."""
        self._model(role)

    def compare_caches(self, qwen3_cache: VisionCache, qwen25_cache: VisionCache) -> CacheComparison:
        """Token match, dimensions and their ratio, and each level's mean, spread, CKA and outliers."""
        return compare(qwen3_cache, qwen25_cache)

    def target_grid(self, image: Image.Image) -> Grid:
        """(gh, gw) that the target's own processor gives an image; needs no weights."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        spec, processor = self.family.target, self._image_processor("qwen25")
        size = processor.size
        height, width = smart_resize(
            image.height, image.width, spec.token_px, size["shortest_edge"], size["longest_edge"]
        )
        return height // spec.token_px, width // spec.token_px

    @exclusive
    def unload(self, model: Role | None = None) -> None:
        """Free a model's memory, or both; the next extraction loads it again."""
        freed = [self._models.pop(name, None) for name in ((model,) if model else tuple(self._models))]
        if self.device.type == "cuda" and any(freed_model is not None for freed_model in freed):
            freed.clear()
            gc.collect()  # models that accelerate placed hold cycles; on a CPU counting references is enough
            torch.cuda.empty_cache()

    def revision(self, role: Role) -> str:
        """The commit of a hub model, or a digest of a local folder."""
        if role not in self._revisions:
            self._revisions[role] = open_checkpoint(self._spec(role)).revision
        return self._revisions[role]

    @property
    def _qwen3_model(self) -> Any:
        return self._models.get("qwen3")

    @_qwen3_model.deleter
    def _qwen3_model(self) -> None:
        self.unload("qwen3")

    @property
    def _qwen25_model(self) -> Any:
        return self._models.get("qwen25")

    @_qwen25_model.deleter
    def _qwen25_model(self) -> None:
        self.unload("qwen25")

    @exclusive
    def _cached(
        self, role: str, images: list[Image.Image], prompt: str, grids: tuple[Grid, ...], run: Any
    ) -> VisionCache:
        """Features from the feature cache, or from the model and into it."""
        empty = VisionCache({}, grids, self._provenance(role, images, prompt))
        if self.feature_cache and (shard := self.feature_cache.get(empty.header)):
            return VisionCache.from_shard(shard).to(self.device)
        tower = self._model(role)
        tower = tower.model.visual if self.scope == "language" else tower
        with tower_attention(tower, self.vision_attention):
            features = run(images, prompt, grids)
        self._check_finite(role, features)
        cache = replace(empty, features={name: value[None] for name, value in features.items()})
        if self.feature_cache:
            try:
                self.feature_cache.put(cache.header, cache.features)
            except OSError as error:  # a full disk, say: the features themselves are fine
                logger.warning("these features are not kept for the next time: %s", error)
        return cache

    def _check_finite(self, role: str, features: dict[str, torch.Tensor]) -> None:
        """Refuse features with NaN or infinity, which make black images, and name the broken weight."""
        if not torch.stack([torch.isfinite(value).all() for value in features.values()]).all():
            name = self._spec(role).name
            raise not_finite(f"the features of {name}", {name: self._model(role)})

    def _provenance(self, role: str, images: list[Image.Image], prompt: str) -> dict[str, str]:
        spec = self._spec(role)
        provenance = {
            "model": spec.name,
            "repo": spec.repo,
            "revision": self.revision(role),
            "scope": self.scope,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantisation": "int8" if self.load_in_8bit else "none",
            "device": self.device.type,
            "features_version": FEATURES_VERSION,
            "vision_attention": self.vision_attention + (", compiled" if self.compiled else ""),
            "images": " ".join(image_digest(image) for image in images),
        }
        if self.scope == "language":
            provenance |= {"prompt": prompt, "language_layers": str(self.language_layers)}
        return provenance

    @torch.inference_mode()
    def _run_source(
        self, images: list[Image.Image], prompt: str, grids: tuple[Grid, ...]
    ) -> dict[str, torch.Tensor]:
        locked = on_grids(images, grids, self.family.source.token_px)
        model = self._model("qwen3")
        if self.scope == "language":
            inputs = self._language_inputs("qwen3", locked, prompt, do_resize=False)
            return source_states(model, inputs, self.language_layers)
        inputs = self._image_processor("qwen3")(images=locked, do_resize=False, return_tensors="pt")
        output = model(
            inputs["pixel_values"].to(self.device, self.dtype), inputs["image_grid_thw"].to(self.device)
        )
        levels = dict(zip(LEVEL_NAMES, output.deepstack_features, strict=True))  # each (N, D), image order
        return {**levels, "merged": output.pooler_output}

    @torch.inference_mode()
    def _run_target(
        self, images: list[Image.Image], prompt: str, grids: tuple[Grid, ...]
    ) -> dict[str, torch.Tensor]:
        model = self._model("qwen25")
        if self.scope == "language":
            inputs = self._language_inputs("qwen25", images, prompt)
            hidden = model.model(**inputs).last_hidden_state  # (1, T, D), after the final norm
            features = hidden[inputs["input_ids"] == model.config.image_token_id]
        else:
            px = self.family.target.token_px
            exact = [(rows * px, columns * px) for rows, columns in grids]
            fits = exact == [(image.height, image.width) for image in images]
            inputs = self._image_processor("qwen25")(images=images, do_resize=not fits, return_tensors="pt")
            pixels, shapes = inputs["pixel_values"].to(self.device, self.dtype), inputs["image_grid_thw"]
            # pooler_output is in image order; last_hidden_state would be in window order
            features = model(pixels, shapes.to(self.device)).pooler_output  # (N, D)
        if len(features) != sum(rows * columns for rows, columns in grids):
            raise RuntimeError(f"{self.family.target.name} made {len(features)} tokens for the grids {grids}")
        return {"vision": features}

    def _language_inputs(self, role: str, images: list[Image.Image], prompt: str, **options: Any) -> Any:
        processor = self._processor(role)
        # The prompt goes first: attention is causal, and behind the images it could not change their
        # states.
        content = [{"type": "text", "text": prompt}, *({"type": "image"} for _ in images)]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=images, return_tensors="pt", **options).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return inputs

    def _spec(self, role: str) -> ModelSpec:
        return self.family.source if role == "qwen3" else self.family.target

    @exclusive
    def _model(self, role: str) -> Any:
        if role not in self._models:
            if not self.keep_models:
                self.unload()
            options = (self.device, self.dtype, self.load_in_8bit, self.device_map)
            if self.scope == "language":
                self._models[role] = load_whole(self._spec(role), *options)
            else:
                self._models[role] = load_tower(self._spec(role), *options).model
                if self.compiled:
                    compile_blocks(self._models[role])
        return self._models[role]

    def _image_processor(self, role: str) -> Any:
        return self._processor(role, images_only=True)

    def _processor(self, role: str, images_only: bool = False) -> Any:
        key = f"{role}:{images_only}"
        if key not in self._processors:  # without the lock where it is loaded: readers ask image by image
            spec = self._spec(role)
            with model_lock:
                self._processors[key] = load_processor(
                    spec.repo, spec.processor_subfolder, spec.revision, images_only
                )
        return self._processors[key]


def _checked_layers(given: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return tuple(-(-depth * quarter // 4) for quarter in (1, 2, 3))
    layers = tuple(given)
    if (
        len(layers) != len(LEVEL_NAMES)
        or sorted(set(layers)) != list(layers)
        or not 1 <= layers[0] <= layers[-1] <= depth
    ):
        raise ValueError(f"language_layers are three rising numbers from 1 to {depth}, not {layers}")
    return layers
