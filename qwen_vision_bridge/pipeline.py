"""`EnhancedQwenImageEdit`: a stock Qwen-Image-Edit pipeline that sees through a bridge on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image

from .batching import Prepared, denoise, prepare, run_stock
from .bridge import VisionBridge, bridge_digest, resolve_bridge
from .cache import VisionCache
from .environment import named_family
from .extractor import VisionCacheExtractor
from .images import ImageLike, Images
from .injection import Grids, LevelAttention, inject
from .io import provenance, version_of
from .loading.editors import editor_revision, load_pipeline
from .loading.families import resolve_family, with_few_steps
from .loading.fingerprint import changed_parts, loaded_state
from .loading.locks import exclusive, model_lock
from .loading.lora_mixin import LoraMixin
from .loading.memory import (
    MemoryPlan,
    check_device,
    device_name,
    find_mode,
    free_gpu_gb,
    log_plan,
    resolve_device,
    resolve_dtype,
    smaller_mode_suggested,
    total_gpu_gb,
)
from .loading.towers import load_processor
from .pairs import (
    Comparison,
    Edit,
    EditResult,
    PipelineOptions,
    check_edit,
    check_encoder,
    check_length,
    check_writable,
    compare_pairs,
    write_sheet,
)
from .patches import condition_grids, effective_sizes, patched, takes_several
from .specs import Family

if TYPE_CHECKING:
    from .patches import EditPipeline

Result = TypeVar("Result")
KEY_VERSION = 2  # raise it when `fingerprint` covers other things, so that kept results are made anew


class EnhancedQwenImageEdit(LoraMixin):
    """Edit images with Qwen-Image-Edit, with or without Qwen3-VL's features through a bridge.

    The stock pipeline is in `.pipe`, loaded on first use and untouched outside a call: LoRAs and schedulers
    are set on it as usual. The target's own features are taken where the pipeline computes them; the source
    tower is loaded for the extraction, and freed before the DiT runs where memory is short.

    Args:
        family: `"qwen"`, `"miniature"`, or a `Family`; `"auto"` is qwen where a GPU can run it.
        bridge: a `VisionBridge`, a folder, a hub id, `"fresh"` (the identity) or `"random"` (seeded noise).
            None is the family's shipped bridge, or a fresh one with a warning.
        load_in_8bit, load_in_4bit: bitsandbytes quantisation of the DiT and the language model; needs CUDA.
        offload: `"model"`, `"group"` or `"sequential"` offload to CPU memory; needs CUDA.
        source, editor: another registered model, hub id or local folder for that role.
        device: None is CUDA where there is one, else the CPU.
        dtype: a torch dtype or its name, such as `"bf16"`; None is bfloat16 on CUDA and float32 on a CPU.
        pipe: a stock pipeline that is loaded already, used as it is.
        options: rare settings; each may also be passed by its own name, such as `site="deepstack"`.

    Raises:
        ValueError: unknown names, quantisation or offload without CUDA, a bridge made for other models.
        GpuMemoryError: too little GPU memory, naming the modes that would fit.
        FileNotFoundError, OSError: a missing bridge or model.
    """

    def __init__(
        self,
        family: str | Family = "auto",
        bridge: VisionBridge | str | Path | None = None,
        load_in_8bit: bool = False,
        *,
        load_in_4bit: bool = False,
        offload: str | None = None,
        source: str | Path | None = None,
        editor: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        pipe: EditPipeline | None = None,
        options: PipelineOptions | None = None,
        **rare: Any,
    ) -> None:
        self.options = options = replace(options or PipelineOptions(), **rare)
        family = resolve_family(named_family(family), source=source, editor=editor)
        self.family = with_few_steps(family, options.fast, options.fast_lora)
        self.mode = find_mode(load_in_8bit, load_in_4bit, offload)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        if pipe is None:
            check_device(self.mode, self.device, self.family, free_gpu_gb(self.device))
        self.plan = MemoryPlan(self.mode, self.family, total_gpu_gb(self.device))
        self.keep_source = self.plan.keeps_source if options.keep_source is None else options.keep_source
        self.bridge, self.bridge_name = resolve_bridge(bridge, self.family)
        if options.compiled:
            self.bridge.compile()
        shared = {name: getattr(options, name) for name in ("vision_attention", "compiled", "feature_cache")}
        self.extractor = VisionCacheExtractor(self.family, False, None, self.device, self.dtype, **shared)
        self._pipe = pipe
        self.use_few_steps(None if pipe is None else self.family.editor.few_step_lora)
        self._stock_state: dict[str, str] | None = None  # as loaded; None for a pipeline passed in
        self._source_users = 0  # how many `keeping_source` are open
        self._early_processor: Any = None  # the editor's, needed before the pipeline is loaded
        self._editor_revision: str | None = None

    @property
    @exclusive
    def pipe(self) -> EditPipeline:
        """The stock diffusers pipeline, loaded on first use; change it only while no call is running."""
        if self._pipe is None:
            log_plan(self.plan, self.device)
            with smaller_mode_suggested(self.mode, self.family.editor):
                self._pipe = load_pipeline(self.family.editor, self.mode, self.device, self.dtype)
            check_encoder(self._pipe, self.family)
            self.use_few_steps(self.family.editor.few_step_lora)
            self._stock_state = loaded_state(self._pipe)
        return self._pipe

    def generate(
        self,
        image: Images,
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
        edit = self.check_edit(image, prompt, seed, strength, **options)
        return self.edit(replace(edit, bridge=self.bridge if use_qwen3_vision else None)).image

    def compare(
        self,
        image: Images,
        prompt: str,
        save_comparison: str | Path | None = None,
        strength: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Comparison:
        """Run the same edit without and with the bridge: same seed, steps, guidance and prompt.

        Args:
            save_comparison: where to write a sheet of images and difference; the rest as `generate`.
        """
        edit = self.check_edit(image, prompt, seed, strength, **options)
        check_writable(edit.options, save_comparison)
        source = self.extract_source(edit.images)  # first, so that the tower is freed before the DiT loads
        baseline, _ = self.edit(edit)
        enhanced, attention = self.edit(replace(edit, bridge=self.bridge, source=source))
        assert attention is not None  # every edit with a bridge has it
        if save_comparison is not None:
            write_sheet(save_comparison, edit, baseline, enhanced, repr(self), self.family)
        return Comparison(baseline, enhanced, attention)

    def attend(self, image: Images, prompt: str, strength: float = 1.0) -> LevelAttention:
        """The level weights alone, for the price of two steps without guidance; no image is decoded."""
        shortest: dict[str, Any] = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "output_type": "latent"}
        edit = self.check_edit(image, prompt, strength=strength, negative_prompt=None, **shortest)
        attention = self.edit(replace(edit, bridge=self.bridge)).attention
        assert attention is not None  # every edit with a bridge has it
        return attention

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
        Returns one record a pair: files, seconds, and the mean absolute difference of the two edits.
        """
        check_writable(options, "sheet.png")
        inputs = product(images, prompts)
        edits = [self.check_edit(image, prompt, seed, strength, **options) for image, prompt in inputs]

        def compare(edit: Edit, sheet: Path) -> Comparison:
            return self.compare(edit.images, edit.prompt, sheet, strength, seed, **options)

        key = [self.fingerprint(True), strength, seed, sorted(options.items())]
        return compare_pairs(compare, edits, Path(output_dir), key, self.provenance([seed]))

    def check_edit(
        self, image: Images, prompt: str, seed: int = 0, strength: float = 1.0, **options: Any
    ) -> Edit:
        """The baseline's edit with the arguments of `generate`, checked; for `edit` and `prepare`."""
        edit = check_edit(self.family, self._pipeline_name(), image, prompt, seed, options, strength)
        check_length(lambda: self._processor().tokenizer, prompt, edit.options["negative_prompt"])
        return replace(edit, site=self.options.site)

    def edit(self, edit: Edit) -> EditResult:
        """Run an edit: what `generate` does, with any bridge on any features."""
        images, attention = self._run(edit, run_stock)
        return EditResult(images[0], attention)

    def prepare(self, edit: Edit) -> Prepared:
        """Run an edit up to its denoising; `denoise` takes any number of them."""
        prepared, attention = self._run(edit, prepare)
        return prepared._replace(attention=attention)

    def denoise(self, edits: Sequence[Prepared]) -> list[Image.Image]:
        """The images of prepared edits of equal sizes and options, denoised together: see `batching`."""
        with self.patched():
            return denoise(self.pipe, edits)

    def _run(self, edit: Edit, call: Callable[..., Result]) -> tuple[Result, LevelAttention | None]:
        """Extract → patch → inject → call the stock pipeline."""
        source = edit.source
        if edit.bridge is not None and source is None:
            source = self.extract_source(edit.images)
        arguments = {
            "image": edit.images if takes_several(self._pipeline_name()) else edit.images[0],
            "prompt": edit.prompt,
            "generator": torch.Generator("cpu").manual_seed(edit.seed),
            **edit.options,
        }
        with self.patched():
            if edit.bridge is None or source is None:
                return call(self.pipe, **arguments), None
            with inject(self.pipe, edit.bridge, source, edit.strength, edit.site) as injection:
                result = call(self.pipe, **arguments)
        return result, injection.attention

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The stock pipeline with every correction that edits need; a lack of GPU memory becomes one line."""
        pipe, editor, options = self.pipe, self.family.editor, self.options
        # After an error diffusers leaves on the GPU what offloading had moved there.
        named = smaller_mode_suggested(self.mode, editor, pipe.maybe_free_model_hooks)
        with model_lock, named, patched(pipe, editor, options.mrope, options.vision_attention):
            yield

    @exclusive
    def extract_source(self, images: Sequence[Image.Image]) -> VisionCache:
        """The source's levels on the grids of the editor's target tower; the tower is freed if it may be."""
        grids = self.condition_grids(images)
        with smaller_mode_suggested(self.mode, self.family.editor, lambda: self.extractor.unload("qwen3")):
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

    def condition_grids(self, images: Sequence[Image.Image]) -> Grids:
        """(gh, gw) of each image as the editor's target tower sees it, computed as the pipeline does."""
        processor = self._processor().image_processor
        return condition_grids(self._pipeline_class(), self.family.editor, processor, list(images))

    def fingerprint(self, enhanced: bool) -> dict[str, Any]:
        """Everything about the models that decides an image of the bridge's arm, or of the baseline."""
        family, options, pipe = self.family, self.options, self._pipe
        if self._editor_revision is None:
            self._editor_revision = editor_revision(family.editor)
        parts: dict[str, Any] = {
            "key_version": KEY_VERSION,
            "family": family.name,
            "editor": {"repo": family.editor.repo, "revision": self._editor_revision},
            "sizes": effective_sizes(self._pipeline_class(), family.editor),
            "changes": {} if pipe is None else changed_parts(pipe, self._stock_state),
            **self.describe_loras(family.editor.few_step_lora, pipe is not None),
            "mrope": options.mrope,
            "vision_attention": options.vision_attention,
            "memory_mode": self.mode.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(self.device, threads=False),
            "versions": {name: version_of(name) for name in ("torch", "transformers", "diffusers")},
        }
        if enhanced:
            parts["source"] = self.extractor.provenance("qwen3")
            name, digest = self.bridge_name, bridge_digest(self.bridge)
            parts["bridge"] = {"name": name, "site": options.site, "digest": digest}
            parts["compiled"] = options.compiled
        return parts

    def provenance(self, seeds: Sequence[int]) -> dict[str, Any]:
        """How a results file was made: command, seeds, models, versions, device, date."""
        parts = self.fingerprint(True)
        del parts["device"], parts["versions"]  # stated in more detail
        return provenance(seeds, device_name(self.device), **parts)

    def __repr__(self) -> str:
        return f"{self.family.editor.name}, bridge: {self.bridge_name}"

    def _free_source(self) -> None:
        if not (self.keep_source or self._source_users):
            self.extractor.unload("qwen3")

    def _processor(self) -> Any:
        if self._pipe is None and self._early_processor is None:
            editor = self.family.editor
            self._early_processor = load_processor(editor.repo, "processor", editor.revision, False)
        return self._early_processor if self._pipe is None else self._pipe.processor

    def _pipeline_name(self) -> str:
        return type(self._pipe).__name__ if self._pipe is not None else self.family.editor.pipeline_class

    def _pipeline_class(self) -> type[EditPipeline]:
        name = self.family.editor.pipeline_class
        return getattr(import_module("diffusers"), name) if self._pipe is None else type(self._pipe)
