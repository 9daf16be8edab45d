"""Offline, on the miniature, one thread a process, with caches of this run's own."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported: pytest-xdist takes the cores, and threads that wait would spin on them.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QWEN_VISION_BRIDGE_HOME"] = tempfile.mkdtemp(prefix="qwen-vision-bridge-tests-")

import pytest
from PIL import Image

from qwen_vision_bridge.loading.registry import FAMILIES

STOCK = FAMILIES["miniature"]
SMALL = replace(STOCK, editor=replace(STOCK.editor, vae_area=64 * 64))
"""The miniature with edits of 64² px: with the stock models, in a quarter of the time."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[object]:
    """Collect no garbage during the imports, and never look through what they leave, which stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else libraries report what is alive at the end as leaked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first, so that the workers finish at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def made_how(path: Path) -> dict[str, Any]:
    """What a PNG of the toolkit says of how it was made."""
    with Image.open(path) as image:
        return json.loads(image.text["qwen_vision_bridge"])  # type: ignore[attr-defined]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["QWEN_VISION_BRIDGE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photograph, 3:2, that scikit-image ships (Eileen Collins, NASA, public domain)."""
    from skimage import data

    return Image.fromarray(data.astronaut()).crop((0, 0, 510, 340)).resize((240, 160))


@pytest.fixture(scope="session")
def photo_file(photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photo.save(path)
    return path


@pytest.fixture(scope="session")
def source_folder() -> Path:
    """The miniature source's checkpoint."""
    from qwen_vision_bridge.loading.checkpoints import locate

    return Path(locate("builtin:source"))


@pytest.fixture(scope="session")
def editor_folder() -> Path:
    """The miniature editor's checkpoint."""
    from qwen_vision_bridge.loading.checkpoints import locate

    return Path(locate("builtin:editor"))


@pytest.fixture(scope="session")
def shared_pipe(editor_folder: Path) -> Any:
    """The stock miniature pipeline, loaded once."""
    import torch
    from diffusers import QwenImageEditPlusPipeline

    pipe = QwenImageEditPlusPipeline.from_pretrained(editor_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def pipe(shared_pipe: Any) -> Iterator[Any]:
    """The stock pipeline; whoever leaves a hook on it fails."""
    yield shared_pipe
    left = [
        type(module).__name__
        for module in shared_pipe.text_encoder.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if "qwen_vision_bridge" in getattr(hook, "__module__", "")
    ]
    assert not left, f"hooks of the project were left on {left}"


@pytest.fixture
def editor(pipe: Any) -> Any:
    """An `EnhancedQwenImageEdit` with a random bridge around the shared pipeline, in fp32, at 64² px."""
    import torch

    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    return EnhancedQwenImageEdit(SMALL, bridge="random", pipe=pipe, dtype=torch.float32)


@pytest.fixture(scope="session")
def levels_and_baseline() -> tuple[list[Any], Any]:
    """Three random levels (1, 20, 256) and a baseline (1, 20, 224)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 20, 256, generator=generator) for _ in range(3)]
    return levels, 3 * torch.randn(1, 20, 224, generator=generator)


def shard_checkpoint(folder: Path, target: Path, shards: int, old_names: bool = False) -> dict[str, str]:
    """Copy a checkpoint into numbered shards with an index, as the hub has them; returns tensor → shard."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    if old_names:
        tensors = {name.replace("model.visual.", "visual."): tensor for name, tensor in tensors.items()}
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, target / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            (target / path.name).write_bytes(path.read_bytes())
    return weight_map
