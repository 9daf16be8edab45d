"""`EnhancedQwenImageEdit`: a stock Qwen-Image-Edit pipeline that sees through a bridge on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from .batching import Prepared, denoise, finished, prepare
from .bridge import VisionBridge, bridge_digest, resolve_bridge
from .cache import VisionCache
from .calls import Comparison, LevelAttention, check_call
from .extractor import VisionCacheExtractor
from .fingerprint import changed_parts, loaded_state
from .images import ImageLike
from .injection import Levels, Site, batched_vision, inject, mrope_positions, shared_latents
from .io import provenance, write_image
from .loading.editors import (
    check_device,
    editor_revision,
    find_mode,
    free_gpu_gb,
    load_pipeline,
    out_of_memory_named,
)
from .loading.locks import exclusive, model_lock
from .loading.placement import MemoryPlan, card_gb, say
from .loading.processors import load_processor
from .loading.tower_attention import VisionAttention, check_vision_attention
from .pairs import run_pairs
from .patches import condition_grids, effective_sizes, image_sizes, takes_several
from .specs import Family, resolve_family

Made = TypeVar("Made")


class EnhancedQwenImageEdit:
    """Edit images with Qwen-Image-Edit, with or without Qwen3-VL's features through a bridge.

    The stock pipeline is in `.pipe`, loaded on first use and untouched outside a call: LoRAs and schedulers
    are set on it as ever. The target's own features are taken where the pipeline computes them; the source
    tower is loaded for the extraction, and freed before the DiT runs where memory is short.

    Args:
        family: `"qwen"`, `"miniature"`, or a `Family`.
        bridge: a `VisionBridge`, a folder, a hub id, `"fresh"` (the identity) or `"random"` (seeded noise).
            None is the family's shipped bridge, or a fresh one, said in a warning.
        load_in_8bit, load_in_4bit: bitsandbytes quantisation of the DiT and the language model; needs CUDA.
        offload: `"model"`, `"group"` or `"sequential"` offload to CPU memory; needs CUDA.
        source, editor: another registered model, hub id or local folder for that role.
        device: None is CUDA where there is one, else the CPU.
        dtype: None is bfloat16 on CUDA and float32 on a CPU.
        mrope: `"fixed"` gives the text encoder three-axis positions, `"stock"` leaves diffusers' behaviour.
        vision_attention: `"batched"` lets both vision towers attend to many windows and images at once, and
            fuses their layers on a GPU, `"stock"` leaves transformers' loop; baseline and enhanced alike.
        site: where the bridge goes in, see `injection.inject`.
        keep_source: keep the source tower in memory between calls; None leaves it to the memory plan, which
            keeps it on a GPU with room for it and frees it before the DiT runs elsewhere.
        compiled: let `torch.compile` fuse the source tower's blocks and the bridge: slow to begin with, equal
            up to rounding.
        feature_cache: as `VisionCacheExtractor`.
        pipe: a stock pipeline that is loaded already, used as it is.

    Raises:
        ValueError: unknown names, quantisation or offload without CUDA, a bridge made for other models.
        GpuMemoryError: too little GPU memory, naming the modes that would fit.
        FileNotFoundError, OSError: a bridge or model that is not there.
    """

    def __init__(
        self,
        family: str | Family = "qwen",
        bridge: VisionBridge | str | Path | None = None,
        load_in_8bit: bool = False,
        *,
        load_in_4bit: bool = False,
        offload: str | None = None,
        source: str | Path | None = None,
        editor: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mrope: str = "fixed",
        vision_attention: VisionAttention = "batched",
        site: Site = "tower",
        keep_source: bool | None = None,
        compiled: bool = False,
        feature_cache: bool | str | Path = True,
        pipe: Any = None,
    ) -> None:
        self.family = resolve_family(family, source=source, editor=editor)
        self.mode = find_mode(load_in_8bit, load_in_4bit, offload)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if pipe is None:
            check_device(self.mode, self.device, self.family, free_gpu_gb(self.device))
        if mrope not in ("fixed", "stock"):
            raise ValueError(f'mrope is "fixed" or "stock", not {mrope!r}')
        self.mrope, self.site = mrope, site
        self.plan = MemoryPlan(self.mode, self.family, card_gb(self.device))
        self.keep_source = self.plan.keeps_source if keep_source is None else keep_source
        self.vision_attention = check_vision_attention(vision_attention)
        self.bridge, self.bridge_name = resolve_bridge(bridge, self.family)
        self.extractor = VisionCacheExtractor(
            self.family,
            load_in_8bit=False,
            device=self.device,
            dtype=self.dtype,
            vision_attention=vision_attention,
            compiled=compiled,
            feature_cache=feature_cache,
        )
        if compiled:
            self.bridge.compile()
        self.compiled = compiled
        self._stock_state: dict[str, str] | None = None  # of the pipeline as loaded; None where it was given
        self._source_users = 0  # how many `keeping_source` are open
        self._pipe = pipe
        self._processor: Any = None  # of the editor, known before the pipeline is loaded
        self._editor_revision: str | None = None

    @property
    @exclusive
    def pipe(self) -> Any:
        """The stock diffusers pipeline, loaded on first use; change it only while no call is running."""
        if self._pipe is None:
            if self.device.type == "cuda":
                say(self.plan)
            with out_of_memory_named(self.mode, self.family.editor):
                self._pipe = load_pipeline(self.family.editor, self.mode, self.device, self.dtype)
            self._stock_state = loaded_state(self._pipe)
            made = self._pipe.text_encoder.config.vision_config.out_hidden_size
            if made != self.family.target.out_dim:
                raise ValueError(
                    f"{self.family.editor.repo} has a text encoder of width {made}, "
                    f"{self.family.target.name} has {self.family.target.out_dim}"
                )
        return self._pipe

    def generate(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str,
        use_qwen3_vision: bool = True,
        strength: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Image.Image:
        """Edit an image, or several as references of one edit.

        Args:
            image: one image or several; the first edit pipeline takes one only.
            prompt: what to change.
            use_qwen3_vision: see through the bridge; False is the baseline.
            strength: scales the bridge's update; 0 gives the stock image bit for bit.
            seed: of the noise, drawn on the CPU so that every device gets the same.
            options: passed to the pipeline: `num_inference_steps`, `true_cfg_scale`, `negative_prompt`,
                `height`, `width`, `callback_on_step_end` …; defaults are the family's.

        Raises:
            TypeError, ValueError, FileNotFoundError, OSError: a bad image, prompt, strength or option.
            FeaturesNotReadError: the pipeline never read the features.
            GpuMemoryError: the GPU ran out of memory.
        """
        images, options = self._checked(image, prompt, strength, seed, options)
        if not use_qwen3_vision:
            return self._run(images, prompt, seed, options)
        return self._own(self.extract_source(images), images, prompt, strength, seed, options)[0]

    def compare(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str,
        save_comparison: str | Path | None = None,
        strength: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Comparison:
        """The same edit without and with the bridge: same seed, steps, guidance and prompt.

        Args:
            save_comparison: where to write a sheet of input, baseline, enhanced and their difference.
            image, prompt, strength, seed, options: as `generate`.

        Returns:
            The two images and the level weights of the enhanced one.
        """
        images, options = self._checked(image, prompt, strength, seed, options)
        cache = self.extract_source(images)  # first, so that the tower has gone when the DiT comes
        baseline = self._run(images, prompt, seed, options)
        enhanced, attention = self._own(cache, images, prompt, strength, seed, options)
        if save_comparison is not None:
            from .plots import comparison_sheet  # draws with matplotlib, which nothing else here needs

            sheet = comparison_sheet(images, baseline, enhanced, prompt, seed, strength, self.describe())
            write_image(save_comparison, sheet)
        return Comparison(baseline, enhanced, attention)

    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str,
        seed: int = 0,
        *,
        bridge: VisionBridge | None = None,
        source: VisionCache | Levels | None = None,
        strength: float = 1.0,
        site: Site = "tower",
        **options: Any,
    ) -> tuple[Image.Image, LevelAttention | None]:
        """One edit with any bridge on features that are there already: what an evaluation's arms need.

        Args:
            bridge: None gives the baseline, and everything after it is ignored.
            source, strength, site: as `injection.inject`.
            image, prompt, seed, options: as `generate`.

        Returns:
            The image, and the level weights where there was a bridge.
        """
        images, options = self._checked(image, prompt, strength, seed, options)
        if bridge is None:
            return self._run(images, prompt, seed, options), None
        source = self.extract_source(images) if source is None else source
        run = partial(self._run, images, prompt, seed, options)
        return self._through(run, bridge, source, strength, site)

    def prepare(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str,
        seed: int = 0,
        *,
        bridge: VisionBridge | None = None,
        source: VisionCache | Levels | None = None,
        strength: float = 1.0,
        site: Site = "tower",
        **options: Any,
    ) -> Prepared:
        """An edit up to its denoising, with the arguments of `edit`; `denoise` takes any number of them."""
        images, options = self._checked(image, prompt, strength, seed, options)
        call = self._call(images, prompt, seed, options)
        with self._ready():
            if bridge is None:
                return prepare(self.pipe, **call)
            source = self.extract_source(images) if source is None else source
            run = partial(prepare, self.pipe, **call)
            prepared, attention = self._through(run, bridge, source, strength, site)
        return prepared._replace(attention=attention)

    def denoise(self, edits: Sequence[Prepared]) -> list[Image.Image]:
        """The images of prepared edits of equal sizes and options, made together: see `batching`."""
        with self._ready():
            return denoise(self.pipe, edits)

    def attend(
        self, image: ImageLike | Sequence[ImageLike], prompt: str, strength: float = 1.0
    ) -> LevelAttention:
        """The level weights alone, for the price of two steps without guidance; no image is decoded."""
        shortest = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "output_type": "latent"}
        images, options = self._checked(image, prompt, strength, 0, shortest)
        options["negative_prompt"] = None
        return self._own(self.extract_source(images), images, prompt, strength, 0, options)[1]

    def benchmark(
        self,
        images: Sequence[ImageLike],
        prompts: Sequence[str],
        output_dir: str | Path = "examples_output/benchmark",
        strength: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Compare every image with every prompt and keep images, times and differences in a folder.

        Pairs that the folder's `results.json` holds already, made from the same inputs, are not done again.

        Returns:
            One record a pair: files, seconds, and the mean absolute difference of the two edits.
        """
        pairs = [
            (self._checked(image, prompt, strength, seed, options)[0], prompt)
            for image in images
            for prompt in prompts
        ]
        return run_pairs(self, pairs, Path(output_dir), strength, seed, options)

    def condition_grids(self, images: Sequence[Image.Image]) -> tuple[tuple[int, int], ...]:
        """(gh, gw) of each image as the editor's target tower sees it, worked out as the pipeline does."""
        return condition_grids(
            self._pipeline_class(), self.family.editor, self._image_processor(), list(images)
        )

    @exclusive
    def extract_source(self, images: Sequence[Image.Image]) -> VisionCache:
        """The source's levels on the grids of the editor's target tower; the tower is freed if it may be."""
        grids = self.condition_grids(images)
        with out_of_memory_named(self.mode, self.family.editor, lambda: self.extractor.unload("qwen3")):
            cache = self.extractor.extract_qwen3_vision(list(images), grids=grids)
        self._free_source()
        return cache

    @contextmanager
    def keeping_source(self) -> Iterator[None]:
        """Keep the source tower between the extractions inside the `with`, and free it afterwards."""
        with model_lock:
            self._source_users += 1
        try:
            yield
        finally:
            with model_lock:
                self._source_users -= 1
                self._free_source()

    def _free_source(self) -> None:
        if not (self.keep_source or self._source_users):
            self.extractor.unload("qwen3")

    def sharing_references(self) -> AbstractContextManager[None]:
        """Encode each reference image once for all edits inside the `with`; the images stay the same."""
        return shared_latents(self.pipe)

    def describe(self) -> str:
        """Editor and bridge in a few words."""
        return f"{self.family.editor.name}, bridge: {self.bridge_name}"

    def fingerprint(self, enhanced: bool) -> dict[str, Any]:
        """Everything about the models that decides an image of one arm, the bridge's arm or the baseline."""
        family = self.family
        if self._editor_revision is None:
            self._editor_revision = editor_revision(family.editor)
        made: dict[str, Any] = {
            "family": family.name,
            "editor": {"repo": family.editor.repo, "revision": self._editor_revision},
            "sizes": effective_sizes(self._pipeline_class(), family.editor),
            "changes": {} if self._pipe is None else changed_parts(self._pipe, self._stock_state),
            "adapters": {} if self._pipe is None else self._pipe.get_list_adapters(),
            "mrope": self.mrope,
            "vision_attention": self.vision_attention,
            "memory_mode": self.mode.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self._device_name(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "diffusers")},
        }
        if enhanced:
            made["source"] = self.extractor.provenance("qwen3")
            digest = bridge_digest(self.bridge)
            made["bridge"] = {"name": self.bridge_name, "site": self.site, "digest": digest}
            made["compiled"] = self.compiled
        return made

    def provenance(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What a results file says about how it was made."""
        made, cpu = self.fingerprint(True), self.device.type == "cpu"
        device = f"CPU, {torch.get_num_threads()} threads" if cpu else made["device"]
        del made["device"], made["versions"]  # said in more words
        return provenance(seeds, device, **made)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def _own(
        self,
        source: VisionCache,
        images: list[Image.Image],
        prompt: str,
        strength: float,
        seed: int,
        options: dict[str, Any],
    ) -> tuple[Image.Image, LevelAttention]:
        """An edit with the pipeline's own bridge and site; the arguments are checked already."""
        run = partial(self._run, images, prompt, seed, options)
        return self._through(run, self.bridge, source, strength, self.site)

    def _through(
        self,
        run: Callable[[], Made],
        bridge: VisionBridge,
        source: VisionCache | Levels,
        strength: float,
        site: Site,
    ) -> tuple[Made, LevelAttention]:
        """Run something of the pipeline through a bridge."""
        with inject(self.pipe, bridge, source, strength, site) as record:
            made = run()
        return made, LevelAttention(record.level_weights, record.grids, bridge.config.levels)

    def _run(self, images: list[Image.Image], prompt: str, seed: int, options: dict[str, Any]) -> Image.Image:
        """One call of the stock pipeline."""
        with self._ready():
            return finished(self.pipe, **self._call(images, prompt, seed, options))[0]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The stock pipeline with right positions, batched towers and the family's image sizes."""
        pipe, editor = self.pipe, self.family.editor
        positions, sizes = mrope_positions(pipe, self.mrope), image_sizes(type(pipe), editor)
        towers = batched_vision(pipe, self.vision_attention)
        # After an error diffusers leaves on the GPU what offloading had brought there.
        named = out_of_memory_named(self.mode, editor, pipe.maybe_free_model_hooks)
        with model_lock, named, positions, towers, sizes:
            yield

    def _call(
        self, images: list[Image.Image], prompt: str, seed: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the stock call."""
        images = images if takes_several(self._pipeline_name()) else images[0]
        noise = torch.Generator("cpu").manual_seed(seed)
        return {"image": images, "prompt": prompt, "generator": noise, **options}

    def _checked(
        self, image: Any, prompt: Any, strength: Any, seed: Any, options: dict[str, Any]
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        return check_call(self.family, self._pipeline_name(), image, prompt, strength, seed, options)

    def _pipeline_name(self) -> str:
        return type(self._pipe).__name__ if self._pipe is not None else self.family.editor.pipeline_class

    def _pipeline_class(self) -> type:
        if self._pipe is not None:
            return type(self._pipe)
        import diffusers

        return getattr(diffusers, self.family.editor.pipeline_class)

    def _image_processor(self) -> Any:
        if self._pipe is not None:
            return self._pipe.processor.image_processor
        if self._processor is None:
            editor = self.family.editor
            self._processor = load_processor(editor.repo, "processor", editor.revision)
        return self._processor
