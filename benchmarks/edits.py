"""Benchmarks of whole edits: baseline, enhanced and stock pipeline in turn, stages, memory modes."""

from __future__ import annotations

import gc
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from qwen_vision_bridge.loading.families import with_few_steps
from qwen_vision_bridge.loading.memory import (
    CARDS_GB,
    MEMORY_MODES,
    GpuMemoryError,
    MemoryMode,
    free_cuda,
    plan_for,
)
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.patches import batched_vision, image_sizes, mrope_positions
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from qwen_vision_bridge.specs import Family

from .runner import Bench
from .timing import Stages, in_turn, peak_memory, summarise, timed

PROMPT = "Change the background to blue"
SHORT = 4  # steps where only stages, memory or bits are measured
FEW, LORA_RANK = 4, 64  # steps of Lightning's LoRA, and its rank
ARMS: dict[str, dict[str, Any]] = {"baseline": {"use_qwen3_vision": False}, "enhanced": {}}


def edits(bench: Bench) -> None:
    """Measure whole edits in turn, the stages inside them, and the memory that the bridge adds."""
    _import_pipeline(bench)
    editor = _load(bench, MEMORY_MODES[0], keep_source=True)
    image = _image(bench)
    _stages(bench, editor, image)
    _strength_zero(bench, editor, image)
    _memory(bench, editor, image)
    _whole_edits(bench, editor, image)
    _freed(bench, editor, image)
    _unload(editor)


def _whole_edits(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    steps = bench.settings.steps or editor.family.steps
    calls = {
        name: partial(editor.generate, image, PROMPT, num_inference_steps=steps, **options)
        for name, options in ARMS.items()
    }
    for options in ARMS.values():  # two steps warm up as well as forty
        editor.generate(image, PROMPT, num_inference_steps=2, **options)
    # Another round than fits would cost the parts that follow their time.
    times = in_turn(calls, bench.device, bench.settings.repeats, 0, lambda took: bench.left() < 1.5 * took)
    name = f"whole edit at {bench.settings.side}², {steps} steps with guidance"
    for arm, seconds in times.items():
        bench.add(f"{name}, {arm}", seconds, "s")
    ratios = [new / old for new, old in zip(times["enhanced"], times["baseline"], strict=True)]
    bench.add(f"{name}, enhanced ÷ baseline", ratios, "times", "<= 1.01" if bench.released else "")
    if bench.left() > times["baseline"][0]:
        _, seconds = timed(lambda: stock_edit(editor, image, steps, "stock"), bench.device)
        bench.add(f"{name}, stock pipeline as installed", seconds, "s")


def few_steps(bench: Bench) -> None:
    """Measure an edit in four steps without guidance beside the whole one, by a LoRA of Lightning's size."""
    _import_pipeline(bench)
    editor = _load(bench, MEMORY_MODES[0], keep_source=True)
    image, whole = _image(bench), bench.settings.steps or editor.family.steps
    for options in ARMS.values():
        editor.generate(image, PROMPT, num_inference_steps=2, **options)
    before = _times(bench, editor, image, {"num_inference_steps": whole}, 1)
    file = write_random_lora(editor.pipe.transformer, bench.output / "random-lora.safetensors")
    with peak_memory(bench.device) as peak:
        _, seconds = timed(lambda: editor.use_few_steps(str(file)), bench.device)
    bench.add(f"LoRA of rank {LORA_RANK} on every layer: loading and proof", seconds, "s")
    bench.add("the same, peak GPU memory", peak[0], "GB", scale=1e-9)
    editor.family = with_few_steps(editor.family, FEW, file)
    editor.generate(image, PROMPT)
    after = _times(bench, editor, image, {}, 5)
    for arm in ARMS:
        bench.add(f"whole edit at {bench.settings.side}², {whole} steps, {arm} (few-steps)", before[arm], "s")
        bench.add(f"edit at {bench.settings.side}², {FEW} steps, {arm}", after[arm], "s")
    ratios = [seconds / before["enhanced"][0] for seconds in after["enhanced"]]
    bar = "<= 0.06" if bench.released else ""
    bench.add(f"enhanced edit in {FEW} steps ÷ in {whole} with guidance", ratios, "times", bar)
    file.unlink()
    _unload(editor)


def _times(
    bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image, options: dict[str, Any], repeats: int
) -> dict[str, list[float]]:
    calls = {name: partial(editor.generate, image, PROMPT, **arm, **options) for name, arm in ARMS.items()}
    return in_turn(calls, bench.device, repeats, 0)


def write_random_lora(transformer: torch.nn.Module, path: Path) -> Path:
    """Write a seeded LoRA for every linear layer of the blocks, bare and with alpha, as Lightning has it."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, layer in transformer.named_modules():
        if name.startswith("transformer_blocks.") and hasattr(layer, "in_features"):
            a = torch.randn(LORA_RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            b = 0.01 * torch.randn(layer.out_features, LORA_RANK, generator=generator)
            tensors |= {f"{name}.lora_down.weight": a.bfloat16(), f"{name}.lora_up.weight": b.bfloat16()}
            tensors[f"{name}.alpha"] = torch.tensor(8.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _freed(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Time an edit's extraction where the source's tower is loaded for it and freed before the DiT runs."""
    editor.keep_source = False
    editor.extractor.unload("qwen3")
    name = "source tower loaded, run and freed: extra time of an edit"
    seconds = in_turn({name: partial(editor.extract_source, [image])}, bench.device, 5)[name]
    bench.add(name, seconds, "s")
    editor.keep_source = True


def _stages(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Measure each stage's time and peak in short edits of both arms, in turn."""
    options = {"num_inference_steps": SHORT}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ARMS}
    peaks: dict[str, dict[str, float]] = {name: {} for name in ARMS}
    for number in range(3):
        for name, arm in ARMS.items():
            with Stages(editor.pipe, editor.bridge, editor.extractor) as stages:
                editor.generate(image, PROMPT, **options, **arm)
            if number == 0:
                continue  # warm-up
            for stage, seconds in stages.seconds().items():
                times[name].setdefault(stage, []).extend(seconds)
                peaks[name][stage] = max(peaks[name].get(stage, -1.0), stages.peaks.get(stage, -1.0))
    for name, by_stage in times.items():
        for stage, seconds in by_stage.items():
            bench.add(f"stage, {stage}, {name}", seconds, "ms", scale=1e3)
            if bench.cuda:
                peak = peaks[name][stage]
                bench.add(f"stage, {stage}, {name}, peak GPU memory", peak, "GB", scale=1e-9)


def _memory(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Measure an edit's peak: baseline, enhanced with the tower kept, enhanced with it freed first."""
    options, peaks = {"num_inference_steps": 2}, {}
    for name in ("baseline", "enhanced, tower freed first", "enhanced, tower kept"):
        editor.extractor.unload("qwen3")
        editor.keep_source = name.endswith("kept")
        free_cuda()
        with peak_memory(bench.device) as peak:
            editor.generate(image, PROMPT, use_qwen3_vision=name != "baseline", **options)
        peaks[name] = peak[0]
        bench.add(f"peak GPU memory of an edit, {name}", peak[0], "GB", scale=1e-9)
    for name, bar in (("tower kept", "<= 1.5"), ("tower freed first", "<= 0.2")):
        more = peaks[f"enhanced, {name}"] - peaks["baseline"]
        bench.add(f"extra peak memory, enhanced over baseline, {name}", more, "GB", bar, scale=1e-9)
    editor.keep_source = True


def _strength_zero(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image, family: str = "") -> None:
    """Check that strength 0 has the bits of the pipeline called by hand, and strength 1 has others."""
    options = {"num_inference_steps": SHORT}
    stock = np.asarray(stock_edit(editor, image, SHORT, editor.options.vision_attention))
    zero = np.asarray(editor.generate(image, PROMPT, strength=0.0, **options))
    one = np.asarray(editor.generate(image, PROMPT, **options))
    name = f"{family}{editor.mode.name}"
    is_stock, is_changed = np.array_equal(zero, stock), not np.array_equal(one, zero)
    bench.add(f"{name}: strength 0 has the stock image's bits", float(is_stock), "", "== 1")
    bench.add(f"{name}: a random bridge changes the image", float(is_changed), "", "== 1")
    bench.add(f"{name}: spread of the stock image's pixels", float(stock.std()), "of 255")


def stock_edit(editor: EnhancedQwenImageEdit, image: Image.Image, steps: int, attention: str) -> Image.Image:
    """Call the pipeline by hand, without the toolkit's class.

    Args:
        attention: `stock` leaves the installed attention and positions, `batched` takes the toolkit's.
    """
    pipe, family = editor.pipe, editor.family
    positions = "stock" if attention == "stock" else editor.options.mrope
    with (
        mrope_positions(pipe, positions),
        batched_vision(pipe, attention),
        image_sizes(type(pipe), family.editor),
    ):
        return pipe(
            image=[image],
            prompt=PROMPT,
            negative_prompt=family.negative_prompt,
            true_cfg_scale=family.true_cfg_scale,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images[0]


def memory_mode(bench: Bench, card_gb: int) -> None:
    """Run an enhanced edit in the mode for a card of this size, with the allocator capped at it.

    On a CPU the plain mode runs without a cap, as a rehearsal.
    """
    family = bench.load_family(editor=True)
    plan = plan_for(family, card_gb if bench.cuda else math.inf, math.inf)
    if plan is None:
        raise ValueError(f"no memory mode fits {card_gb} GB")
    mode = plan.mode
    name = f"{card_gb} GB mode ({mode.name})"
    if bench.cuda:
        total = torch.cuda.mem_get_info(bench.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, card_gb * 1e9 / total))
    fits = 0.0
    try:
        _capped(bench, mode, name)
        fits = 1.0
    except GpuMemoryError as error:
        print(f"  {name}: {error}")
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    bar = "== 1" if bench.cuda and card_gb in (24, 16) else ""
    bench.add(f"{name}: an enhanced edit completes inside the cap", fits, "", bar)


def miniature_modes(bench: Bench) -> None:
    """Edit with the miniature in every memory mode; on a CPU in the plain mode alone."""
    from qwen_vision_bridge.synthetic.cases import sample_image

    family = FAMILIES["miniature"]
    for mode in MEMORY_MODES if bench.cuda else MEMORY_MODES[:1]:
        editor = _editor(bench, family, mode)
        _strength_zero(bench, editor, sample_image(family.image_size), "miniature, ")
        _unload(editor)


def _capped(bench: Bench, mode: MemoryMode, name: str) -> None:
    _import_pipeline(bench)
    image, steps = _image(bench), 2 * SHORT
    with peak_memory(bench.device) as peak:
        editor, seconds = timed(lambda: _load(bench, mode, None), bench.device)
    bench.add(f"{name}: loading", seconds, "s")
    bench.add(f"{name}: loading, peak GPU memory", peak[0], "GB", scale=1e-9)
    with peak_memory(bench.device) as peak:
        editor.generate(image, PROMPT, num_inference_steps=2)
        _, seconds = timed(lambda: editor.generate(image, PROMPT, num_inference_steps=steps), bench.device)
    bench.add(f"{name}: enhanced edit of {steps} steps with guidance", seconds, "s")
    bench.add(f"{name}: edit, peak GPU memory", peak[0], "GB", scale=1e-9)
    if bench.cuda:
        reserved = float(torch.cuda.max_memory_reserved(bench.device))
        bench.add(f"{name}: most that the allocator reserved", reserved, "GB", scale=1e-9)
    with Stages(editor.pipe, editor.bridge, editor.extractor) as stages:
        editor.generate(image, PROMPT, num_inference_steps=2)
    bench.add(f"{name}: DiT step", summarise(stages.seconds()["DiT step"]), "ms", scale=1e3)
    _strength_zero(bench, editor, image)
    _unload(editor)


def _load(bench: Bench, mode: MemoryMode, keep_source: bool | None) -> EnhancedQwenImageEdit:
    """An editor whose pipeline is loaded; the time and peak of a plain load are recorded."""
    editor = _editor(bench, bench.load_family(editor=True), mode, keep_source)
    with peak_memory(bench.device) as peak:
        pipe, seconds = timed(lambda: editor.pipe, bench.device)
    pipe.set_progress_bar_config(disable=True)
    if mode is MEMORY_MODES[0]:
        bench.add("load, whole editor", seconds, "s")
        bench.add("load, whole editor, peak GPU memory", peak[0], "GB", scale=1e-9)
    return editor


def _editor(
    bench: Bench, family: Family, mode: MemoryMode, keep_source: bool | None = None
) -> EnhancedQwenImageEdit:
    return EnhancedQwenImageEdit(
        family,
        bridge="random",
        load_in_8bit=mode.bits == 8,
        load_in_4bit=mode.bits == 4,
        offload=mode.offload,
        device=bench.device,
        dtype=bench.dtype,
        keep_source=keep_source,
        feature_cache=False,
    )


def _import_pipeline(bench: Bench) -> None:
    """Import diffusers and its pipeline, which is no part of loading a model."""
    import diffusers

    getattr(diffusers, bench.load_family(editor=True).editor.pipeline_class)


def _image(bench: Bench) -> Image.Image:
    from qwen_vision_bridge.synthetic.cases import sample_image

    return sample_image(bench.settings.side)


def _unload(editor: EnhancedQwenImageEdit) -> None:
    editor.extractor.unload()
    editor._pipe = None
    gc.collect()
    free_cuda()


def cards() -> tuple[int, ...]:
    """GB of the cards whose modes are measured; `edits` measures the largest card's."""
    return CARDS_GB[1:]
