"""The models, editors and families that the toolkit knows by name."""

from __future__ import annotations

from ..specs import BUILTIN, EditorSpec, Family, ModelSpec


def _qwen3(
    size: str, depth: int, width: int, levels: tuple[int, ...], out: int, layers: int, kind: str
) -> ModelSpec:
    name = f"Qwen3-VL-{size}"
    return ModelSpec(name, f"Qwen/{name}-Instruct", kind, depth, width, 16, out, layers, levels)


def _qwen25(size: str, out: int, layers: int) -> ModelSpec:
    name = f"Qwen2.5-VL-{size}"
    return ModelSpec(name, f"Qwen/{name}-Instruct", "qwen2_5_vl", 32, 1280, 14, out, layers)


def _editor(release: str, pipeline_class: str, lightning: str) -> EditorSpec:
    """A released editor with its LoRAs of lightx2v (Qwen-Image-Lightning) for 4 and 8 steps."""
    name = f"Qwen-Image-Edit{release}"
    files = ((steps, f"{name}-Lightning-{steps}steps-V1.0-bf16.safetensors") for steps in (4, 8))
    few_steps = tuple((steps, f"lightx2v/{lightning}{file}") for steps, file in files)
    return EditorSpec(name, f"Qwen/{name}", pipeline_class, few_steps=few_steps)


_DEEP, _SHALLOW = (8, 16, 24), (5, 11, 17)
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _qwen3("2B", 24, 1024, _SHALLOW, 2048, 28, "qwen3_vl"),
        _qwen3("4B", 24, 1024, _SHALLOW, 2560, 36, "qwen3_vl"),
        _qwen3("8B", 27, 1152, _DEEP, 4096, 36, "qwen3_vl"),
        _qwen3("32B", 27, 1152, _DEEP, 5120, 64, "qwen3_vl"),
        _qwen3("30B-A3B", 27, 1152, _DEEP, 2048, 48, "qwen3_vl_moe"),
        _qwen3("235B-A22B", 27, 1152, _DEEP, 4096, 94, "qwen3_vl_moe"),
        _qwen25("3B", 2048, 36),
        _qwen25("7B", 3584, 28),
        _qwen25("32B", 5120, 64),
        _qwen25("72B", 8192, 80),
        ModelSpec("miniature-source", f"{BUILTIN}source", "qwen3_vl", 6, 128, 8, 256, 3, (1, 3, 5)),
        ModelSpec(
            "miniature-target",
            f"{BUILTIN}target",
            "qwen2_5_vl",
            4,
            128,
            4,
            224,
            4,
            subfolder="text_encoder",
            processor_subfolder="processor",
        ),
    )
}

EDITORS: dict[str, EditorSpec] = {
    spec.name: spec
    for spec in (
        _editor("", "QwenImageEditPipeline", "Qwen-Image-Lightning/"),
        _editor("-2509", "QwenImageEditPlusPipeline", "Qwen-Image-Lightning/Qwen-Image-Edit-2509/"),
        _editor("-2511", "QwenImageEditPlusPipeline", "Qwen-Image-Edit-2511-Lightning/"),
        EditorSpec(
            "miniature-editor",
            f"{BUILTIN}editor",
            "QwenImageEditPlusPipeline",
            28 * 28,
            128 * 128,
            4,
            0.0,
            0.0,
            few_steps=((4, f"{BUILTIN}few-steps-4.safetensors"),),
        ),
    )
}

FAMILIES: dict[str, Family] = {
    "miniature": Family(
        "miniature",
        MODELS["miniature-source"],
        MODELS["miniature-target"],
        EDITORS["miniature-editor"],
        bridge_rank=48,
        steps=20,
        image_size=128,
        synthetic_only=True,
        chat_template=False,
        reply_tokens=5,
    ),
    "qwen": Family(
        "qwen",
        MODELS["Qwen3-VL-8B"],
        MODELS["Qwen2.5-VL-7B"],
        EDITORS["Qwen-Image-Edit-2509"],
        bridge_rank=192,
        steps=40,
    ),
}
