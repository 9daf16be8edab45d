"""Benchmarks of whole edits: baseline, enhanced and stock pipeline in turn, their stages, memory modes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen_vision_bridge.injection import batched_vision, mrope_positions
from qwen_vision_bridge.loading.memory import (
    CARDS_GB,
    MEMORY_MODES,
    GpuMemoryError,
    MemoryMode,
    best_mode,
    free_cuda,
)
from qwen_vision_bridge.patches import image_sizes
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

from .runner import Bench
from .timing import Stages, in_turn, peak_memory, summarise, timed

PROMPT = "Change the background to blue"
SHORT = 4  # steps where only stages, memory or bits are looked at
ARMS = {"baseline": {"use_qwen3_vision": False}, "enhanced": {}}


def edits(bench: Bench) -> None:
    """Whole edits in turn, the stages inside them, and what the bridge adds in memory."""
    _import_pipeline(bench)
    editor = _load(bench, MEMORY_MODES[0], keep_source=True)
    image = _image(bench)
    _stages(bench, editor, image)
    _strength_zero(bench, editor, image)
    _memory(bench, editor, image)
    _whole(bench, editor, image)
    _freed(bench, editor, image)
    _unload(editor)


def _whole(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    steps = bench.settings.steps or editor.family.steps
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda o=options: editor.generate(image, PROMPT, num_inference_steps=steps, **o))
        for name, options in ARMS.items()
    }
    for call in ARMS.values():  # a few steps warm everything up that forty would
        editor.generate(image, PROMPT, num_inference_steps=2, **call)
    # A round too many would cost the rest of the time, and what comes after.
    found = in_turn(calls, bench.device, bench.settings.repeats, 0, lambda took: bench.left() < 1.5 * took)
    where = f"{bench.settings.side}², {steps} steps with guidance"
    for name, seconds in found.items():
        bench.add(f"whole edit at {where}, {name}", seconds, "s")
    ratios = [new / old for new, old in zip(found["enhanced"], found["baseline"], strict=True)]
    bench.add(
        f"whole edit at {where}, enhanced ÷ baseline", ratios, "times", "<= 1.01" if bench.released else ""
    )
    if bench.left() > found["baseline"][0]:
        _, seconds = timed(lambda: stock_edit(editor, image, steps, "stock"), bench.device)
        bench.add(f"whole edit at {where}, stock pipeline as installed", seconds, "s")


def _freed(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """What an edit pays where the source's tower is loaded for it and freed before the transformer runs."""
    editor.keep_source = False
    editor.extractor.unload("qwen3")
    seconds = in_turn({"x": lambda: editor.extract_source([image])}, bench.device, 5)["x"]
    bench.add("source tower loaded, run and freed: extra time of an edit", seconds, "s")
    editor.keep_source = True


def _stages(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Each stage's time and peak in short edits of both arms, in turn."""
    options = {"num_inference_steps": SHORT}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ARMS}
    peaks: dict[str, dict[str, float]] = {name: {} for name in ARMS}
    for number in range(3):
        for name, arm in ARMS.items():
            with Stages(editor.pipe, editor.bridge, editor.extractor) as stages:
                editor.generate(image, PROMPT, **options, **arm)
            if number == 0:
                continue  # warm-up
            for stage, seconds in stages.seconds().items():
                found[name].setdefault(stage, []).extend(seconds)
                peaks[name][stage] = max(peaks[name].get(stage, -1.0), stages.peaks.get(stage, -1.0))
    for name, stages_found in found.items():
        for stage, seconds in stages_found.items():
            bench.add(f"stage, {stage}, {name}", seconds, "ms", scale=1e3)
            if bench.cuda:
                peak = peaks[name][stage]
                bench.add(f"stage, {stage}, {name}, peak GPU memory", peak, "GB", scale=1e-9)


def _memory(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Peak of an edit: baseline, enhanced with the tower kept, enhanced with the tower freed first."""
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


def _strength_zero(bench: Bench, editor: EnhancedQwenImageEdit, image: Image.Image) -> None:
    """Strength 0 has the bits of the pipeline called by hand; strength 1 has others."""
    options = {"num_inference_steps": SHORT}
    stock = np.asarray(stock_edit(editor, image, SHORT, editor.vision_attention))
    zero = np.asarray(editor.generate(image, PROMPT, strength=0.0, **options))
    one = np.asarray(editor.generate(image, PROMPT, **options))
    mode = editor.mode.name
    bench.add(
        f"{mode}: strength 0 has the stock image's bits", float(np.array_equal(zero, stock)), "", "== 1"
    )
    bench.add(f"{mode}: a random bridge changes the image", float(not np.array_equal(one, zero)), "", "== 1")
    bench.add(f"{mode}: spread of the stock image's pixels", float(stock.std()), "of 255")


def stock_edit(editor: EnhancedQwenImageEdit, image: Image.Image, steps: int, attention: str) -> Image.Image:
    """The pipeline called by hand, without the toolkit's class.

    Args:
        attention: `stock` leaves the installed attention and positions, `batched` gives both of ours.
    """
    pipe, family = editor.pipe, editor.family
    positions = "stock" if attention == "stock" else editor.mrope
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
    """An enhanced edit in the mode for a card of this size, with the allocator capped at it.

    On a CPU the plain mode runs without a cap, as a rehearsal.
    """
    family = bench.load_family(editor=True)
    mode = best_mode(family, card_gb, math.inf) if bench.cuda else MEMORY_MODES[0]
    if mode is None:
        raise ValueError(f"no memory mode is for {card_gb} GB")
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
    wanted = "== 1" if bench.cuda and card_gb in (24, 16) else ""
    bench.add(f"{name}: an enhanced edit completes inside the cap", fits, "", wanted)


def _capped(bench: Bench, mode: MemoryMode, name: str) -> None:
    _import_pipeline(bench)
    image, steps = _image(bench), 2 * SHORT
    with peak_memory(bench.device) as peak:
        editor, seconds = timed(lambda: _load(bench, mode, None), bench.device)
    bench.add(f"{name}: loading", seconds, "s")
    bench.add(f"{name}: loading, peak GPU memory", peak[0], "GB", scale=1e-9)
    with peak_memory(bench.device) as peak:
        editor.generate(image, PROMPT, num_inference_steps=2)
        calls = {"x": lambda: editor.generate(image, PROMPT, num_inference_steps=steps)}
        seconds = in_turn(calls, bench.device, 1, warmup=0)["x"]
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
    editor = EnhancedQwenImageEdit(
        bench.load_family(editor=True),
        bridge="random",
        load_in_8bit=mode.bits == 8,
        load_in_4bit=mode.bits == 4,
        offload=mode.offload,
        device=bench.device,
        dtype=bench.dtype,
        keep_source=keep_source,
        feature_cache=False,
    )
    with peak_memory(bench.device) as peak:
        pipe, seconds = timed(lambda: editor.pipe, bench.device)
    pipe.set_progress_bar_config(disable=True)
    if mode is MEMORY_MODES[0]:
        bench.add("load, whole editor", seconds, "s")
        bench.add("load, whole editor, peak GPU memory", peak[0], "GB", scale=1e-9)
    return editor


def _import_pipeline(bench: Bench) -> None:
    """diffusers and its pipeline come on first use, which is no part of loading a model."""
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
    """Sizes of the cards that have a mode of their own, GB; the largest is what `edits` measures."""
    return CARDS_GB[1:]
