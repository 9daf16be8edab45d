"""Checkpoints with random weights in the released models' layout: key names, sharding, configs, processors.

    python -m benchmarks.random_checkpoints Qwen3-VL-8B /dev/shm/qwen3-vl-8b

Loading, memory and speed do not depend on the weights' values, so these stand in for the released ones where
those are out of reach. One block of noise is repeated through every matrix, from another offset each time:
57 GB are written in the time of a copy. The tokenizer and its ids are the miniature's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qwen_vision_bridge.loading.locks import model_lock
from qwen_vision_bridge.loading.towers import TOWER_PREFIX
from qwen_vision_bridge.specs import check_seed
from qwen_vision_bridge.synthetic.miniature import SCHEDULER, write_model_index
from qwen_vision_bridge.synthetic.tokenizer import CHAT_TEMPLATE, build_tokenizer

SHARD_BYTES = 4_900_000_000
NOISE = 8 * 2**20  # values in the block of noise
EDITOR = "Qwen-Image-Edit-2509"
# fmt: off
QWEN3_VL_8B: dict[str, Any] = {
    "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
    "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
        "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
}
QWEN25_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    },
}
TRANSFORMER: dict[str, Any] = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}
VAE: dict[str, Any] = {  # latents_mean and latents_std stay at the class's own
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
TINY: dict[str, Any] = {  # to rehearse: the layout and every depth of a tower, at an eighth of the widths
    "Qwen3-VL-8B": {
        "vision": {"hidden_size": 144, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 512},
        "text": {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4,
                 "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 1024},
    },
    "Qwen2.5-VL-7B": {
        "vision": {"hidden_size": 160, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 512},
        "text": {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4,
                 "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 1024},
    },
    "transformer": {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 512},
    "vae": {"base_dim": 16, "num_res_blocks": 1},
}
# fmt: on
CONFIGS = {"Qwen3-VL-8B": QWEN3_VL_8B, "Qwen2.5-VL-7B": QWEN25_VL_7B}
PROCESSORS = {
    "Qwen3-VL-8B": {
        "patch_size": 16,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "Qwen2.5-VL-7B": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
}


def write_checkpoint(
    model: str, folder: Path, layers: int | None = None, seed: int = 0, tiny: bool = False
) -> int:
    """Write a vision-language model: config, processor, tokenizer and random bf16 shards.

    Args:
        model: a key of `CONFIGS`.
        layers: language layers, None for the released number.
        tiny: an eighth of the widths, to rehearse.

    Returns:
        Bytes of the weights.
    """
    check_seed(seed)
    config = model_config(model, layers, tiny)
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(model, folder)
    total = write_weights(folder, "model", vision_language_shapes(config), seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # last: a folder with it is whole
    return total


def write_editor(
    folder: Path, layers: int | None = None, dit_layers: int | None = None, seed: int = 0, tiny: bool = False
) -> int:
    """Write a whole Qwen-Image-Edit pipeline in diffusers' layout, with random bf16 weights.

    `text_encoder/` is a whole checkpoint of Qwen2.5-VL-7B, processor included; one that is there is kept.

    Args:
        layers, dit_layers: of language model and transformer, None for the released numbers.
        tiny: an eighth of the widths, to rehearse.

    Returns:
        Bytes of the weights.
    """
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    check_seed(seed)
    total = 0
    if not (folder / "text_encoder" / "config.json").is_file():
        total = write_checkpoint("Qwen2.5-VL-7B", folder / "text_encoder", layers, seed, tiny)
    write_processor("Qwen2.5-VL-7B", folder / "processor")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    transformer = {**TRANSFORMER, **(TINY["transformer"] if tiny else {})}
    transformer["num_layers"] = dit_layers or transformer["num_layers"]
    vae = {**VAE, **(TINY["vae"] if tiny else {})}
    for name, model_class, settings in (
        ("vae", AutoencoderKLQwenImage, vae),
        ("transformer", QwenImageTransformer2DModel, transformer),
    ):
        model = _empty(model_class, settings)
        (folder / name).mkdir(parents=True, exist_ok=True)
        model.save_config(folder / name)
        shapes = [(key, tensor.shape) for key, tensor in model.state_dict().items()]
        total += write_weights(folder / name, "diffusion_pytorch_model", iter(shapes), seed + 1)
    write_model_index(folder / "model_index.json")
    return total


def is_complete(folder: Path, towers_only: bool = False) -> bool:
    """Whether a checkpoint was written to its end and its shards (or those of its tower alone) are there."""
    if not (folder / "config.json").is_file():
        return False
    return all((folder / shard).is_file() for shard in _shards(folder, towers_only))


def drop_language_shards(folder: Path) -> None:
    """Delete a sharded checkpoint's files that hold nothing of its tower."""
    for shard in _shards(folder, False) - _shards(folder, True):
        (folder / shard).unlink(missing_ok=True)


def _shards(folder: Path, towers_only: bool) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {"model.safetensors"}
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {shard for name, shard in weight_map.items() if TOWER_PREFIX.match(name) or not towers_only}


def model_config(model: str, layers: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """The released config of a vision-language model, with the tokenizer's ids, as a copy of its own."""
    config = json.loads(json.dumps(CONFIGS[model]))
    text = config.get("text_config", config)
    if tiny:
        config["vision_config"].update(TINY[model]["vision"])
        text.update(TINY[model]["text"])
    if layers is not None:
        text["num_hidden_layers"] = layers
    ids = build_tokenizer().convert_tokens_to_ids
    names = {
        "image_token_id": "image_pad",
        "video_token_id": "video_pad",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }
    config |= {key: ids(f"<|{name}|>") for key, name in names.items()}
    return config


def write_processor(model: str, folder: Path) -> None:
    """Write the released image processor's settings beside the miniature's tokenizer."""
    import transformers

    sizes = {"merge_size": 2, "temporal_patch_size": 2, **PROCESSORS[model]}
    kind = "Qwen3VL" if model.startswith("Qwen3") else "Qwen2VL"
    processor = getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**sizes),
        build_tokenizer(),
        getattr(transformers, f"{kind}VideoProcessor")(**sizes),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **sizes}  # the older file, as the hub has it
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def vision_language_shapes(config: dict[str, Any]) -> Iterator[tuple[str, torch.Size]]:
    """Hub names and shapes of every tensor; Qwen2.5-VL's are the older names, `visual.*` and `model.*`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with model_lock, init_empty_weights():
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config["model_type"], **settings)
        )
    for name, tensor in model.state_dict().items():
        if config["model_type"] == "qwen2_5_vl":
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        yield name, tensor.shape


def write_weights(folder: Path, stem: str, shapes: Iterator[tuple[str, torch.Size]], seed: int = 0) -> int:
    """Write bf16 shards of at most SHARD_BYTES, and their index where there are several.

    Matrices have std 1/√fan-in, norms are 1 and biases 0, so that activations stay of order one.

    Returns:
        Bytes of the tensors.
    """
    shards: list[dict[str, torch.Size]] = [{}]
    held = total = 0
    for name, shape in shapes:
        size = 2 * shape.numel()
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held, total = held + size, total + size
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))
    blocks: dict[float, memoryview] = {}
    for scale in {_scale(name, shape) for shard in shards for name, shape in shard.items()}:
        block = noise * scale if scale > 0 else torch.full((NOISE,), -scale)
        blocks[scale] = memoryview(block.bfloat16().view(torch.uint8).numpy())
    whole = len(shards) == 1
    files = [
        f"{stem}.safetensors" if whole else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # writing releases the GIL
        jobs = [
            threads.submit(_write_shard, folder / file, shard, blocks)
            for file, shard in zip(files, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    if not whole:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return total


def _scale(name: str, shape: torch.Size) -> float:
    """Standard deviation of a tensor's noise; zero or less stands for a constant of that size."""
    if len(shape) < 2 or "gamma" in name:  # norms of the VAE are shaped (channels, 1, 1, 1)
        return 0.0 if name.endswith("bias") else -1.0
    is_table = "embed_tokens" in name or "pos_embed" in name
    return 1.0 if is_table else 1 / math.sqrt(shape[1:].numel())


def _write_shard(path: Path, members: dict[str, torch.Size], blocks: dict[float, memoryview]) -> None:
    """One safetensors file: 8 bytes of header length, the JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in members.items():
        stop = offset + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(members.items()):
            block, left = blocks[_scale(name, shape)], 2 * shape.numel()
            start = (number * 7919 * 64) % (NOISE // 2) * 2  # bytes; another offset for every tensor
            while left:
                left -= file.write(block[start : start + min(left, len(block) - start)])
                start = 0


def _empty(model_class: type, settings: dict[str, Any]) -> Any:
    from accelerate import init_empty_weights

    with model_lock, init_empty_weights():
        return model_class(**settings)


def main() -> None:
    """Write one checkpoint."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("model", choices=[*sorted(CONFIGS), EDITOR])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="language layers, to rehearse with less")
    parser.add_argument("--dit-layers", type=int, help="layers of the transformer, to rehearse with less")
    parser.add_argument("--tiny", action="store_true", help="an eighth of the widths, to rehearse")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = {"layers": options.layers, "seed": options.seed, "tiny": options.tiny}
    if options.model == EDITOR:
        size = write_editor(options.folder, dit_layers=options.dit_layers, **shape)
    else:
        size = write_checkpoint(options.model, options.folder, **shape)
    print(f"{options.model}: {size / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
