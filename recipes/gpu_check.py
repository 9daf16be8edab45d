"""What only a GPU can show: released-shape towers and language models in 8 bits, and every memory mode.

Writes random checkpoints at the released shapes (33 GB, see released_shapes.py), loads them with the
toolkit's own code, and runs the miniature's whole edit in each memory mode on CUDA. Results: a JSON list.

    python recipes/gpu_check.py --folder /dev/shm --output recipes/gpu_check.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.random_checkpoints import write_checkpoint
from qwen_vision_bridge import EnhancedQwenImageEdit, VisionBridge, VisionCacheExtractor
from qwen_vision_bridge.bridge import count_parameters
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.memory import MEMORY_MODES
from qwen_vision_bridge.loading.towers import load_tower, load_whole
from qwen_vision_bridge.synthetic.cases import sample_image

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Results:
    """A list of measurements that is on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        self.device = torch.cuda.get_device_name() if CUDA else "CPU"

    def add(self, name: str, value: Any, unit: str = "") -> None:
        made = {"device": self.device, "command": " ".join(sys.argv), "torch": torch.__version__}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows.append({"name": name, "value": value, "unit": unit, **made, "date": date})
        self.path.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        print(f"{name:64} {value} {unit}", flush=True)


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="where the checkpoints are written"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--layers", type=int, help="language layers, to rehearse with less")
    arguments = parser.parse_args()
    results = Results(arguments.output)
    source, target = arguments.folder / "qwen3-vl-8b", arguments.folder / "qwen2.5-vl-7b"
    for name, folder in (("Qwen3-VL-8B", source), ("Qwen2.5-VL-7B", target)):
        if not (folder / "config.json").exists():
            results.add(
                f"{name}: bytes of random weights", write_checkpoint(name, folder, arguments.layers), "B"
            )
    check_memory_modes(results)
    check_extraction(results, source, target)
    check_eight_bits(results, source)


def check_extraction(results: Results, source: Path, target: Path) -> None:
    """Both towers through the extractor: shapes, bytes read, time, memory; and the seed's numbers."""
    family = resolve_family("qwen", source=source, target=target)
    extractor = VisionCacheExtractor(family, feature_cache=False, device=DEVICE)
    image = sample_image(448)
    for role, extract in (
        ("qwen3", extractor.extract_qwen3_vision),
        ("qwen25", extractor.extract_qwen25_vision),
    ):
        cache, seconds, peak = measured(lambda call=extract: call(image))
        results.add(f"{role}: features at 448²", {k: list(v.shape) for k, v in cache.features.items()})
        results.add(f"{role}: finite", all(bool(v.isfinite().all()) for v in cache.features.values()))
        results.add(f"{role}: tower loaded and run", round(seconds, 2), "s")
        results.add(f"{role}: peak GPU memory", round(peak / 1e9, 3), "GB")
        _, seconds, _ = measured(lambda call=extract: call(image))
        results.add(f"{role}: tower run again, loaded", round(seconds, 3), "s")
    report = load_tower(family.source, DEVICE, torch.bfloat16)
    results.add("qwen3: bytes read for the tower", report.bytes_read, "B")
    results.add("qwen3: bytes of the checkpoint", report.total_bytes, "B")
    results.add("default bridge", count_parameters(VisionBridge()), "parameters")


def check_eight_bits(results: Results, source: Path) -> None:
    """The released-shape tower and language model in 8 bits."""
    if not CUDA:
        return
    spec = resolve_family("qwen", source=source).source
    exact = load_tower(spec, DEVICE, torch.bfloat16).model
    quantised, seconds, peak = measured(
        lambda: load_tower(spec, DEVICE, torch.bfloat16, load_in_8bit=True).model
    )
    kinds = {str(parameter.dtype) for parameter in quantised.blocks.parameters() if parameter.ndim == 2}
    results.add("8-bit tower: dtypes of the blocks' matrices", sorted(kinds))
    results.add("8-bit tower: loaded in", round(seconds, 2), "s")
    pixels, grid = torch.randn(1024, 1536, device=DEVICE, dtype=torch.bfloat16), torch.tensor([[1, 32, 32]])
    with torch.inference_mode():
        one, other = exact(pixels, grid.to(DEVICE)), quantised(pixels, grid.to(DEVICE))
    for name, a, b in zip(
        ("early", "mid", "late"), one.deepstack_features, other.deepstack_features, strict=True
    ):
        results.add(f"8-bit tower: relative error, {name}", round(float((a - b).norm() / a.norm()), 4))
    results.add("8-bit tower: GPU memory", round(memory_of(quantised) / 1e9, 3), "GB")
    results.add("bf16 tower: GPU memory", round(memory_of(exact) / 1e9, 3), "GB")
    del exact, quantised, one, other
    whole, seconds, peak = measured(lambda: load_whole(spec, DEVICE, torch.bfloat16, load_in_8bit=True))
    layer = whole.model.language_model.layers[0].mlp.up_proj.weight
    results.add("8-bit whole model: dtype of a language layer", str(layer.dtype))
    results.add(
        "8-bit whole model: dtype of the tower", str(whole.model.visual.blocks[0].attn.qkv.weight.dtype)
    )
    results.add("8-bit whole model: loaded in", round(seconds, 2), "s")
    results.add("8-bit whole model: peak GPU memory", round(peak / 1e9, 2), "GB")
    hidden = whole.model.config.text_config.hidden_size
    with torch.inference_mode():
        states = whole.model(
            inputs_embeds=torch.randn(1, 64, hidden, device=DEVICE, dtype=torch.bfloat16)
        ).last_hidden_state
    results.add("8-bit whole model: language model runs", [list(states.shape), bool(states.isfinite().all())])


def check_memory_modes(results: Results) -> None:
    """The miniature's edit on CUDA in every memory mode: the bridge acts, strength 0 is the stock one."""
    photo = sample_image(128)
    for mode in MEMORY_MODES if CUDA else MEMORY_MODES[:1]:
        editor = EnhancedQwenImageEdit(
            "miniature",
            bridge="random",
            load_in_8bit=mode.bits == 8,
            load_in_4bit=mode.bits == 4,
            offload=mode.offload,
            device=DEVICE,
            feature_cache=False,
        )
        (baseline, enhanced, _), seconds, _ = measured(lambda e=editor: e.compare(photo, "make it blue"))
        zero = editor.generate(photo, "make it blue", strength=0.0)
        results.add(f"miniature, {mode.name}: strength 0 is stock", same(zero, baseline))
        results.add(f"miniature, {mode.name}: a random bridge acts", not same(enhanced, baseline))
        results.add(f"miniature, {mode.name}: two edits of 20 steps", round(seconds, 2), "s")


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images are equal bit for bit."""
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def memory_of(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def measured(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result, seconds and peak GPU bytes of a call."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, torch.cuda.max_memory_allocated() if CUDA else 0


if __name__ == "__main__":
    main()
