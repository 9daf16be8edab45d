"""Time and memory of one edit of the miniature on this machine, in fresh processes.

python -m recipes.miniature.cost --editor weights/editor --source weights/source --threads 2
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

PROMPT = 'Change the text to "FOX".'


def main() -> None:
    """Measure once in this process and print the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--editor", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(once(arguments.source, arguments.editor, arguments.steps)))


def once(source: str, editor: str, steps: int) -> dict[str, float]:
    """Seconds to load the family and for one edit of each arm, and the peak of resident memory in GB.

    Libraries are imported before the clock starts: their time does not depend on the model.
    """
    from diffusers import QwenImageEditPlusPipeline  # noqa: F401 - both libraries import lazily
    from transformers import (  # noqa: F401
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLProcessor,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )

    from qwen_vision_bridge import EnhancedQwenImageEdit
    from qwen_vision_bridge.synthetic.cases import sample_image

    image = sample_image(128)
    start = time.perf_counter()
    pipeline = EnhancedQwenImageEdit(
        "miniature",
        bridge="random",
        source=source,
        editor=editor,
        device="cpu",
        feature_cache=False,
        keep_source=True,
    )
    pipeline.pipe.set_progress_bar_config(disable=True)
    pipeline.extractor.extract_qwen3_vision(image)
    seconds = {"load": time.perf_counter() - start}
    for name, enhanced in (("baseline", False), ("enhanced", True)):
        start = time.perf_counter()
        pipeline.generate(image, PROMPT, enhanced, num_inference_steps=steps)
        seconds[name] = time.perf_counter() - start
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of Linux; macOS counts bytes
    return {**seconds, "memory": kibibytes * (1 if sys.platform == "darwin" else 1024) / 1e9}


def repeated(
    source: str, editor: str, steps: int, times: int = 5, threads: int = 2
) -> dict[str, list[float]]:
    """Run `once` in several fresh processes; values by figure."""
    folders = ["--source", str(Path(source).resolve()), "--editor", str(Path(editor).resolve())]
    settings = ["--steps", str(steps), "--threads", str(threads)]
    command = [sys.executable, "-m", "recipes.miniature.cost", *folders, *settings]
    figures: dict[str, list[float]] = {}
    for _ in range(times):
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        for name, value in json.loads(output.stdout.splitlines()[-1]).items():
            figures.setdefault(name, []).append(value)
    return figures


NAMES = {
    "load": "cost: loading the whole family and one extraction, libraries imported, s",
    "baseline": "cost: one edit with guidance, s",
    "enhanced": "cost: one edit with guidance through a bridge, s",
    "memory": "cost: peak of resident memory, GB",
}


def named(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    """The figures under their names in the card."""
    return {NAMES[name]: values for name, values in figures.items()}


if __name__ == "__main__":
    main()
