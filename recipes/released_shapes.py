"""Write checkpoints at the released models' true shapes with random weights, in the hub's layout.

Key names, sharding and configs are the hub's; only the values are noise. Loading, memory and speed do not
depend on values, so these stand in for the released weights where those cannot be had.

    python recipes/released_shapes.py Qwen3-VL-8B /dev/shm/qwen3-vl-8b
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 4_900_000_000
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
# fmt: on
CONFIGS = {"Qwen3-VL-8B": QWEN3_VL_8B, "Qwen2.5-VL-7B": QWEN25_VL_7B}
PROCESSORS = {
    "Qwen3-VL-8B": {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216},
                    "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "Qwen2.5-VL-7B": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
}  # fmt: skip


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="language layers, to rehearse with less")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.model, arguments.folder, arguments.layers, arguments.seed)
    print(f"{arguments.model}: {total / 1e9:.2f} GB in {arguments.folder}")


def write_checkpoint(model: str, folder: Path, layers: int | None = None, seed: int = 0) -> int:
    """Write config, processor and random bf16 shards; returns the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(CONFIGS[model]))
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | PROCESSORS[model], indent=2))
    shards: list[dict[str, torch.Size]] = [{}]
    held = 0
    for name, shape in shapes(config):
        if held + shape.numel() * 2 > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += shape.numel() * 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weight_map, total = {}, 0
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(name, shape, generator) for name, shape in members.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, torch.Size]]:
    """Hub names and shapes of every tensor; Qwen2.5-VL's are the older names, `visual.*` and `model.*`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config["model_type"], **settings)
        )
    for name, tensor in model.state_dict().items():
        if config["model_type"] == "qwen2_5_vl":
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        yield name, tensor.shape


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Matrices at std 1/√fan-in, norms at 1, biases at 0, so that activations stay of order one."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    fan_in = 1 if "embed" in name and "patch" not in name else shape[1:].numel()
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return (noise / fan_in**0.5).cpu()


if __name__ == "__main__":
    main()
