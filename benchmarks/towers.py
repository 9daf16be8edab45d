"""Benchmarks of loading, of both vision towers and of the bridge, and how near the chip's limit they run."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge, count_parameters
from qwen_vision_bridge.extractor import VisionCacheExtractor
from qwen_vision_bridge.loading.memory import free_cuda
from qwen_vision_bridge.loading.tower_attention import VisionAttention, tower_attention
from qwen_vision_bridge.loading.towers import compile_blocks, load_tower, load_whole
from qwen_vision_bridge.specs import LEVEL_NAMES, Family, ModelSpec

from .runner import Bench
from .timing import in_turn, peak_memory, timed

BATCHES = (1, 8, 32, 64)
EXPECTED_LINES = (  # of the extraction example at the released shapes
    "Early features: torch.Size([1, 256, 4096])",
    "Mid features: torch.Size([1, 256, 4096])",
    "Late features: torch.Size([1, 256, 4096])",
    "Vision features: torch.Size([1, 256, 3584])",
    "Vision token count match: True",
    "Dimension mismatch: True",
    "Dimension ratio: 1.14",
    "Total bridge parameters: ~5.2M",
)


def extraction(bench: Bench) -> None:
    """Load both towers alone, then both whole models in 8 bits; extract one image with each."""
    family, released = bench.load_family(whole=True), bench.released
    ready: list[float] = []
    for number in range(4):
        free_cuda()
        with peak_memory(bench.device) as peak:
            source, first = timed(lambda: load_tower(family.source, bench.device, bench.dtype), bench.device)
        target, second = timed(lambda: load_tower(family.target, bench.device, bench.dtype), bench.device)
        if number:  # the first warms the page cache
            ready.append(first + second)
        bench.add("load, source tower alone, peak GPU memory", peak[0], "GB", scale=1e-9)
        read, total = source.bytes_read, source.total_bytes
        del source, target
    bench.add("load, both towers alone: ready to extract", ready, "s")
    bench.add("bytes of the source's checkpoint", total, "GB", scale=1e-9)
    bench.add("bytes read of it for the features", read, "GB", "<= 1.25" if released else "", scale=1e-9)
    whole_models, seconds = _load_whole_models(bench, family)
    share = sorted(ready)[len(ready) // 2] / seconds
    bench.add("ready to extract, towers alone ÷ whole models", share, "", "<= 0.15" if released else "")
    _extract_both_ways(bench, family, whole_models)


def _load_whole_models(bench: Bench, family: Family) -> tuple[VisionCacheExtractor, float]:
    """An extractor with both whole models in memory, and the seconds that loading them took."""
    extractor = VisionCacheExtractor(
        family,
        load_in_8bit=bench.cuda,
        device=bench.device,
        dtype=bench.dtype,
        scope="language",
        feature_cache=False,
        keep_models=True,
    )
    free_cuda()
    with peak_memory(bench.device) as peak:
        seconds = sum(timed(partial(extractor.warm, role), bench.device)[1] for role in ("qwen3", "qwen25"))
    whole = "both whole models in 8 bits" if bench.cuda else "both whole models"
    bench.add(f"load, {whole}: ready to extract (whole-model loading)", seconds, "s")
    bench.add(f"load, {whole}, peak GPU memory", peak[0], "GB", scale=1e-9)
    return extractor, seconds


def _extract_both_ways(bench: Bench, family: Family, whole_models: VisionCacheExtractor) -> None:
    from qwen_vision_bridge.synthetic.cases import sample_image

    image = sample_image(family.image_size)
    towers = VisionCacheExtractor(
        family, device=bench.device, dtype=bench.dtype, feature_cache=False, keep_models=True
    )
    calls = {
        "towers alone": partial(_extract, towers, image),
        "whole models": partial(_extract, whole_models, image),
    }
    for name, seconds in in_turn(calls, bench.device, 5).items():
        bench.add(f"features of one {family.image_size}² image from both, {name}", seconds, "ms", scale=1e3)
    whole_models.unload()
    towers.unload()


def _extract(extractor: VisionCacheExtractor, image: Image.Image) -> None:
    extractor.extract_qwen3_vision(image)
    extractor.extract_qwen25_vision(image)


def expected_output(bench: Bench) -> None:
    """Check that the extraction example prints the expected lines."""
    import example_extraction

    family, printed = bench.load_family(), io.StringIO()
    roles = ["--source", family.source.repo, "--target", family.target.repo]
    output = bench.settings.folder / "example"
    with contextlib.redirect_stdout(printed):
        example_extraction.main(["--models", bench.settings.family, *roles, "--output", str(output)])
    missing = [line for line in EXPECTED_LINES if line not in printed.getvalue()]
    total = len(EXPECTED_LINES)
    bench.add(
        "expected lines in the extraction example's output",
        total - len(missing),
        f"of {total}",
        f"== {total}" if bench.released else "",
    )
    if bench.released:
        for line in missing:
            print(f"  missing: {line}")


def eight_bit(bench: Bench) -> None:
    """Quantise the source's tower and its whole model to 8 bits: time, memory, error of the features."""
    if not bench.cuda:
        print("  8-bit loading needs a CUDA device: nothing is measured")
        return
    spec = bench.load_family(whole=True).source
    exact = load_tower(spec, bench.device, bench.dtype).model
    quantised, seconds = timed(
        lambda: load_tower(spec, bench.device, bench.dtype, load_in_8bit=True).model, bench.device
    )
    bench.add("8-bit source tower: loading", seconds, "s")
    call = _forward(exact, spec, 1, 16, bench)
    outputs = [call("batched", tower) for tower in (exact, quantised)]
    for level, a, b in zip(LEVEL_NAMES, *(output.deepstack_features for output in outputs), strict=True):
        error = float((a - b).norm() / a.norm())
        bench.add(f"8-bit source tower: relative error of {level} features", error, "")
    for name, tower in (("8-bit", quantised), ("bf16", exact)):
        size = sum(tensor.nbytes for tensor in (*tower.parameters(), *tower.buffers()))
        bench.add(f"{name} source tower: GPU memory", size, "GB", scale=1e-9)
    del exact, quantised, tower, outputs, call
    free_cuda()
    with peak_memory(bench.device) as peak:
        model, seconds = timed(
            lambda: load_whole(spec, bench.device, bench.dtype, load_in_8bit=True), bench.device
        )
    bench.add("8-bit whole source model: loading", seconds, "s")
    bench.add("8-bit whole source model: loading, peak GPU memory", peak[0], "GB", scale=1e-9)
    width = model.config.get_text_config().hidden_size
    with torch.inference_mode():
        embeddings = torch.randn(1, 64, width, device=bench.device, dtype=bench.dtype)
        states = model.model(inputs_embeds=embeddings).last_hidden_state
    bench.add("8-bit whole source model: states are finite", float(states.isfinite().all()), "", "== 1")


def source_tower(bench: Bench) -> None:
    """Time the source tower, one image and batches, against the chip's rate of matrix products."""
    spec = bench.load_family().source
    rate = _matrix_rate(bench)
    bench.add(
        "matrix products, 8192³ bf16" if bench.cuda else "matrix products, 1024³ fp32",
        rate,
        "TFLOP/s",
        scale=1e-12,
    )
    tower = load_tower(spec, bench.device, bench.dtype).model
    cuda = bench.cuda
    for tokens in (16, 32):
        call = _forward(tower, spec, 1, tokens, bench)
        calls = {mode: partial(call, mode) for mode in ("batched", "stock")}
        for attention, seconds in in_turn(calls, bench.device, 20 if cuda else 3).items():
            name = f"source tower, one {tokens * spec.token_px}² image, {attention} attention"
            bench.add(name, seconds, "ms", scale=1e3)
    best = 0.0
    for batch in BATCHES if cuda else BATCHES[:2]:
        best = max(best, _batched(bench, tower, spec, batch, rate, ""))
    _best(bench, spec, best)


def compiled_tower(bench: Bench) -> None:
    """Time the source tower compiled and plain, in batches."""
    spec, cuda = bench.load_family().source, bench.cuda
    rate, batch = _matrix_rate(bench), 32 if cuda else 8
    tower = load_tower(spec, bench.device, bench.dtype).model
    plain = _batched(bench, tower, spec, batch, rate, "")
    _, seconds = timed(lambda: _compile_and_run(bench, tower, spec, batch), bench.device)
    bench.add("source tower: compiling, first batch included", seconds, "s")
    compiled = _batched(bench, tower, spec, batch, rate, ", compiled")
    bench.add(f"source tower, batch of {batch}: compiled over plain", compiled / plain, "times")
    _best(bench, spec, max(compiled, plain, bench.value_of(_best_name(spec)) or 0.0))


def _compile_and_run(bench: Bench, tower: nn.Module, spec: ModelSpec, batch: int) -> None:
    compile_blocks(tower, "inductor" if bench.cuda else "eager")
    _forward(tower, spec, batch, 16, bench)("batched")


def _best(bench: Bench, spec: ModelSpec, best: float) -> None:
    bench.add(_best_name(spec), best, "images/s", ">= 150" if bench.released else "")


def _best_name(spec: ModelSpec) -> str:
    return f"source tower, {16 * spec.token_px}² images, best batch"


def _batched(bench: Bench, tower: nn.Module, spec: ModelSpec, batch: int, rate: float, how: str) -> float:
    """Images per second of one batch size, with its FLOPs, bytes and share of the chip's matrix rate."""
    call = _forward(tower, spec, batch, 16, bench)
    with FlopCounterMode(display=False) as counter:
        if not how:  # a compiled block hides its operations
            call("batched")
    name = f"source tower, batch of {batch} at {16 * spec.token_px}²{how}"
    repeats = 10 if bench.cuda else 2
    seconds = in_turn({name: partial(call, "batched")}, bench.device, repeats, 2)[name]
    rates = [batch / second for second in seconds]
    bench.add(name, rates, "images/s")
    flops = counter.get_total_flops() or _tower_flops(spec, tower, batch)
    median = sorted(seconds)[len(seconds) // 2]
    bench.add(f"{name}: work", flops, "TFLOP", scale=1e-12)
    least = _least_bytes(tower, spec, batch)
    bench.add(f"{name}: least traffic (weights, pixels, features once)", least, "GB", scale=1e-9)
    bench.add(f"{name}: share of the matrix rate", flops / median / rate, "")
    return sorted(rates)[len(rates) // 2]


def _tower_flops(spec: ModelSpec, tower: nn.Module, batch: int) -> float:
    """FLOPs of a batch, counted by hand: two a multiplication, of all matrices and of attention."""
    patches = batch * 16 * 16 * spec.merge_size**2
    blocks = 2 * patches * sum(p.numel() for p in tower.blocks.parameters() if p.ndim == 2)
    attention = 4 * patches * (patches // batch) * spec.hidden_size * spec.depth
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    merging = sum(p.numel() for module in mergers for p in module.parameters() if p.ndim == 2)
    embedding = 2 * patches * tower.patch_embed.proj.weight.numel()
    return blocks + attention + 2 * patches / spec.merge_size**2 * merging + embedding


def _least_bytes(tower: nn.Module, spec: ModelSpec, batch: int) -> float:
    """Bytes that have to cross the memory bus at least once."""
    size = next(tower.parameters()).element_size()
    weights = sum(p.nbytes for p in tower.parameters())
    pixels = batch * 16 * 16 * spec.merge_size**2 * 3 * 2 * spec.patch_size**2 * size
    return weights + pixels + batch * 16 * 16 * spec.out_dim * (1 + len(spec.levels)) * size


def _forward(tower: nn.Module, spec: ModelSpec, batch: int, tokens: int, bench: Bench) -> Callable[..., Any]:
    """A call of the tower, or of another, on the same random images of tokens × tokens."""
    side = tokens * spec.merge_size
    width = 3 * tower.config.temporal_patch_size * spec.patch_size**2
    pixels = torch.randn(batch * side * side, width, device=bench.device, dtype=bench.dtype)
    grids = torch.tensor([[1, side, side]] * batch, device=bench.device)

    @torch.inference_mode()
    def call(mode: VisionAttention, tower: nn.Module = tower) -> Any:
        with tower_attention(tower, mode):
            return tower(pixels, grid_thw=grids)

    return call


def _matrix_rate(bench: Bench) -> float:
    """FLOP/s of a large square product, the best of ten."""
    size = 8192 if bench.cuda else 1024
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    seconds = in_turn({"product": partial(torch.matmul, a, b)}, bench.device, 10, warmup=3)["product"]
    return 2 * size**3 / min(seconds)


def target_tower(bench: Bench) -> None:
    """Time the target tower with stock and with batched attention, and compare both with float32."""
    spec = bench.load_family().target
    tower = load_tower(spec, bench.device, bench.dtype).model
    for side in (384, 1024):
        tokens = max(2, round(side / spec.token_px))
        if not bench.released:
            tokens = min(tokens, 16)
        _target_side(bench, tower, spec, side, tokens)


def _target_side(bench: Bench, tower: nn.Module, spec: ModelSpec, side: int, tokens: int) -> None:
    name = f"target tower, {side}² image"
    call = _forward(tower, spec, 1, tokens, bench)
    calls = {mode: partial(call, mode) for mode in ("stock", "batched")}
    seconds = in_turn(calls, bench.device, 20 if bench.cuda else 3, 2)
    for mode, values in seconds.items():
        bench.add(f"{name}, {mode} attention", values, "ms", scale=1e3)
    ratios = [slow / fast for slow, fast in zip(seconds["stock"], seconds["batched"], strict=True)]
    bar = ">= 4" if bench.released and side == 1024 else ""
    bench.add(f"{name}, stock ÷ batched time", ratios, "times", bar)
    outputs = {mode: call(mode).pooler_output.float() for mode in seconds}
    exact = call("stock", copy.deepcopy(tower).float()).pooler_output
    for mode, output in outputs.items():
        error = float((output - exact).norm() / exact.norm())
        bench.add(f"{name}, {mode} attention against float32: relative error", error, "")


def bridge(bench: Bench) -> None:
    """Time the bridge by tokens, compiled and not, and measure the error of its arithmetic."""
    config = BridgeConfig.for_family(bench.load_family(), init="random")
    module = VisionBridge(config).to(bench.device).eval().requires_grad_(False)
    backend, repeats = ("inductor", 30) if bench.cuda else ("eager", 3)
    bench.add("bridge, parameters", count_parameters(module), "M", scale=1e-6)
    inputs = {tokens: _bridge_inputs(config, tokens, bench) for tokens in (1024, 4096)}
    calls = {str(tokens): partial(module, *features) for tokens, features in inputs.items()}
    times = in_turn(calls, bench.device, repeats, 3)
    for tokens, seconds in times.items():
        bench.add(f"bridge, {tokens} tokens", seconds, "ms", scale=1e3)
    ratios = [large / small for large, small in zip(times["4096"], times["1024"], strict=True)]
    bench.add("bridge, time at 4096 ÷ at 1024 tokens", ratios, "times", "<= 4.4")
    _bridge_errors(bench, config, module, *inputs[1024])
    module.compile(backend=backend)
    seconds = in_turn({"4096": calls["4096"]}, bench.device, repeats, 3)["4096"]
    bench.add("bridge, 4096 tokens, compiled", seconds, "ms", scale=1e3)


def _bridge_inputs(
    config: BridgeConfig, tokens: int, bench: Bench
) -> tuple[list[torch.Tensor], torch.Tensor]:
    options = {"device": bench.device, "dtype": bench.dtype}
    levels = [torch.randn(1, tokens, config.source_dim, **options) for _ in config.levels]
    return levels, torch.randn(1, tokens, config.target_dim, **options)


@torch.no_grad()
def _bridge_errors(
    bench: Bench,
    config: BridgeConfig,
    module: VisionBridge,
    levels: list[torch.Tensor],
    baseline: torch.Tensor,
) -> None:
    """Relative error of the update against double precision on the same inputs."""
    exact_bridge = VisionBridge(config).to(bench.device).double()
    exact = torch.stack(exact_bridge.contributions([x.double() for x in levels], baseline.double())[0]).sum(0)
    halved = VisionBridge(config).to(bench.device).bfloat16()
    for name, candidate in (("fp32", module), ("bf16", halved)):
        update = torch.stack(candidate.contributions(levels, baseline)[0]).sum(0).double()
        error = float((update - exact).norm() / exact.norm())
        bench.add(f"bridge, {name} weights: relative error of the update against float64", error, "")
