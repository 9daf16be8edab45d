"""Build the miniature family with random weights: the released models' own classes at small size.

`source/` is a Qwen3-VL and `editor/` a Qwen-Image-Edit-Plus pipeline whose `text_encoder/` is the target
Qwen2.5-VL, in the hub's layout. Training starts from these weights; the package ships the trained ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vision_bridge.specs import TARGET_PX

from .tokenizer import CHAT_TEMPLATE, VOCABULARY, build_tokenizer

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SEED = 0
MAX_SHARD = "12MB"

# fmt: off
SOURCE_VISION = {
    "depth": 6, "hidden_size": 128, "intermediate_size": 448, "num_heads": 4, "patch_size": 8,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256, "num_position_embeddings": 256,
    "deepstack_visual_indexes": [1, 3, 5],
}
SOURCE_TEXT = {
    "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
    },
}
TARGET_VISION = {
    "depth": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 224, "window_size": 32,
    "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
}
TARGET_TEXT = {
    "hidden_size": 224, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 10, 10]},
}
VAE = {
    "base_dim": 16, "z_dim": 8, "dim_mult": [1, 2, 4], "num_res_blocks": 1,
    "temperal_downsample": [False, False], "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8,
}
TRANSFORMER = {
    "patch_size": 2, "in_channels": 32, "out_channels": 8, "num_layers": 7, "attention_head_dim": 32,
    "num_attention_heads": 6, "joint_attention_dim": 224, "axes_dims_rope": [8, 12, 12],
}
SCHEDULER = {  # the released scheduler's settings
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# fmt: on


def build(root: Path, part: str, seed: int = SEED) -> Path:
    """Write the random `source`, `target` or `editor` under `root`; parts that are there are kept.

    `target` is the editor's text encoder and processor alone, which needs no diffusers; its folder is
    `editor`.

    Returns:
        The folder of the part.
    """
    if part == "source":
        _place(root / "source", lambda folder: _write_source(folder, seed))
        return root / "source"
    editor = root / "editor"
    _place(editor / "text_encoder", lambda folder: _write_target(folder, seed))
    _place(editor / "processor", lambda folder: target_processor().save_pretrained(folder))
    _place(editor / "tokenizer", lambda folder: build_tokenizer().save_pretrained(folder))
    if part == "editor":
        _place(editor / "vae", lambda folder: _write_vae(folder, seed))
        _place(editor / "transformer", lambda folder: _write_transformer(folder, seed))
        _place(editor / "scheduler", _write_scheduler)
        _place(editor / "model_index.json", write_model_index)
    return editor


def source_processor() -> Any:
    """The source's processor: 16 px a token, up to 1024 tokens."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    limits = {"shortest_edge": 4 * 16 * 16, "longest_edge": 1024 * 16 * 16}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=limits, **sizes),
        build_tokenizer(),
        Qwen3VLVideoProcessor(size=limits, **sizes),
        chat_template=CHAT_TEMPLATE,
    )


def target_processor() -> Any:
    """The target's processor: all images become about TARGET_PX² large, however far they were reduced."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    patch = TARGET_VISION["patch_size"]
    sizes = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"shortest_edge": TARGET_PX**2, "longest_edge": TARGET_PX**2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=limits, **sizes),
        build_tokenizer(),
        Qwen2VLVideoProcessor(size=limits, **sizes),
        chat_template=CHAT_TEMPLATE,
    )


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Seed weights under which a small model reacts to its input: matrices at std 1/√fan-in, others neutral.

    Each tensor has a stream of its own, keyed by its name, so that adding a layer changes no other.
    At transformers' own std of 0.02 images and prompts hardly move the output of a model of this width.
    """
    import torch

    for name, parameter in model.named_parameters():
        stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(stream)
        with torch.no_grad():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "gamma" in name:  # norms of the VAE are shaped (channels, 1, 1, 1)
                parameter.fill_(1.0)
            else:
                fan_in = 1 if "embed_tokens" in name or "pos_embed" in name else parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise / fan_in**0.5)
    return model.eval()


def vision_language_config(config_class: type, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """The whole model's config from its parts, with the tokenizer's ids."""
    ids = build_tokenizer().convert_tokens_to_ids
    special = {"bos_token_id": None, "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>")}
    return config_class(
        vision_config=dict(vision),
        text_config={**text, "vocab_size": VOCABULARY, **special},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def save_weights(model: nn.Module, folder: Path) -> None:
    """Cast a model to bf16 and write it in stock layout, in files of at most MAX_SHARD."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for files of a few MB is noise
    for parameter in model.parameters():  # diffusers' own `.to` warns about a dtype change without a cause
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    transformers_logging.enable_progress_bar()


def _write_source(folder: Path, seed: int) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = vision_language_config(Qwen3VLConfig, SOURCE_VISION, SOURCE_TEXT)
    save_weights(randomise(Qwen3VLForConditionalGeneration(config), seed), folder)
    source_processor().save_pretrained(folder)


def _write_target(folder: Path, seed: int) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = vision_language_config(Qwen2_5_VLConfig, TARGET_VISION, TARGET_TEXT)
    save_weights(randomise(Qwen2_5_VLForConditionalGeneration(config), seed + 1), folder)


def _write_vae(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKLQwenImage

    save_weights(randomise(AutoencoderKLQwenImage(**VAE), seed + 2), folder)


def _write_transformer(folder: Path, seed: int) -> None:
    from diffusers import QwenImageTransformer2DModel

    save_weights(randomise(QwenImageTransformer2DModel(**TRANSFORMER), seed + 3), folder)


def _write_scheduler(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder)


def write_model_index(path: Path) -> None:
    """Write the `model_index.json` of a Qwen-Image-Edit-Plus pipeline."""
    from diffusers import __version__

    index = {
        "_class_name": "QwenImageEditPlusPipeline",
        "_diffusers_version": __version__,
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _place(path: Path, write: Any) -> None:
    """Write a file or folder beside its place and rename it in; whoever comes second drops his copy."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(workshop / path.name)
        try:
            os.rename(workshop / path.name, path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    logger.info("built random weights: %s", path)
