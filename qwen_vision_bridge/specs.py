"""Specs of models and editors, families that belong together, and which seeds and prompts they take."""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILTIN = "builtin:"  # marks the weights that the package ships, see `loading.checkpoints.locate`
TARGET_PX = 64  # a side of what the miniature's target tower takes, however far the image was reduced before
LEVEL_NAMES = ("early", "mid", "late")
SOURCE_TYPES = ("qwen3_vl", "qwen3_vl_moe")
TARGET_TYPES = ("qwen2_5_vl",)
VISION_SIZES = {"depth", "hidden_size", "patch_size", "spatial_merge_size", "out_hidden_size"}
TEXT_SIZE, TAPS = "num_hidden_layers", "deepstack_visual_indexes"
TEMPLATE_TOKEN = re.compile(r"<\|\w+\|>")
SURROGATE = re.compile(r"[\ud800-\udfff]")
STOCK_CONDITION_AREA, STOCK_AREA = 384 * 384, 1024 * 1024  # px², diffusers' own for the tower and the output
STOCK_STEP = 32  # px, to whose multiples it rounds
MAX_SEED = 2**63 - 1  # the largest that NumPy, PyTorch and a signed 64-bit column of a table all take


@dataclass(frozen=True)
class ModelSpec:
    """One vision-language model and the shapes that its checkpoint's config must state."""

    name: str
    """Short name, as users write it."""
    repo: str
    """Hub id, local folder, or `builtin:` location."""
    model_type: str
    """transformers' `model_type` of the whole model."""
    depth: int
    """Blocks of the vision tower."""
    hidden_size: int
    """Width of the vision tower."""
    patch_size: int
    """px of one patch side."""
    out_dim: int
    """Width of a merged vision token, equal to the language model's."""
    language_layers: int
    """Layers of the language model."""
    levels: tuple[int, ...] = ()
    """Blocks after which DeepStack taps the tower; empty for a target."""
    merge_size: int = 2
    """Patches merged into one token, per side."""
    subfolder: str = ""
    """Folder of config and weights inside the repository."""
    processor_subfolder: str = ""
    """Folder of the processor inside the repository."""
    revision: str | None = None
    """Branch, tag or commit; None is the default branch."""

    def __post_init__(self) -> None:
        if self.model_type not in SOURCE_TYPES + TARGET_TYPES:
            raise ValueError(
                f"{self.name}: model type {self.model_type!r} is not supported, "
                f"only {', '.join(SOURCE_TYPES + TARGET_TYPES)}"
            )
        if self.model_type in SOURCE_TYPES and len(self.levels) != len(LEVEL_NAMES):
            raise ValueError(
                f"{self.name}: needs {len(LEVEL_NAMES)} DeepStack taps, its config has {self.levels}"
            )

    @property
    def token_px(self) -> int:
        """px of one merged token's side: 32 for Qwen3-VL, 28 for Qwen2.5-VL."""
        return self.patch_size * self.merge_size

    @property
    def shapes(self) -> dict[str, Any]:
        """Every size that a checkpoint's config must state."""
        sizes = ("depth", "hidden_size", "patch_size", "merge_size", "out_dim", "levels", "language_layers")
        return {key: getattr(self, key) for key in ("model_type", *sizes)}

    @property
    def role(self) -> str:
        """`source` or `target`."""
        return "source" if self.model_type in SOURCE_TYPES else "target"

    @classmethod
    def from_config(cls, config: dict[str, Any], **where: str) -> ModelSpec:
        """Read the shapes from a checkpoint's `config.json`; `where` gives name, repo and the folders.

        A field that the file leaves out has the default of transformers' config class, as when a model is
        loaded: releases from 4.49 on do not write what equals it.

        Raises:
            ValueError: the config is not that of a supported vision-language model, or a field of it is no
                size; file and field are named.
        """
        vision = config.get("vision_config")
        if config.get("model_type") not in SOURCE_TYPES + TARGET_TYPES:
            raise ValueError(
                f"{where.get('repo')}: its config is of type {config.get('model_type')!r}; "
                f"needed is one of {', '.join(SOURCE_TYPES + TARGET_TYPES)}"
            )
        file, flat = f"{where.get('repo')}: config.json", "text_config" not in config
        if not isinstance(vision, dict):
            raise ValueError(f"{file}: vision_config is {vision!r}; needed: an object with the tower's sizes")
        text = config if flat else config["text_config"]  # Qwen2.5-VL's hub config is flat
        stated = VISION_SIZES | ({TAPS} if config["model_type"] in SOURCE_TYPES else set())
        if not vision.keys() >= stated or (isinstance(text, dict) and TEXT_SIZE not in text):
            defaults = _class_defaults(config["model_type"])
            vision = defaults["vision_config"] | vision
            text = defaults["text_config"] | text if isinstance(text, dict) else text
        depth = _size(vision, "depth", f"{file}: vision_config")
        return cls(
            model_type=config["model_type"],
            depth=depth,
            hidden_size=_size(vision, "hidden_size", f"{file}: vision_config"),
            patch_size=_size(vision, "patch_size", f"{file}: vision_config"),
            merge_size=_size(vision, "spatial_merge_size", f"{file}: vision_config"),
            out_dim=_size(vision, "out_hidden_size", f"{file}: vision_config"),
            language_layers=_size(text, TEXT_SIZE, f"{file}: text_config"),
            levels=_levels(vision, depth, file) if config["model_type"] in SOURCE_TYPES else (),
            **where,
        )

    def check(self, other: ModelSpec) -> None:
        """Compare with the spec read from a checkpoint.

        Raises:
            ValueError: a size differs; both are named.
        """
        wrong = [
            f"{key} {size} instead of {self.shapes[key]}"
            for key, size in other.shapes.items()
            if size != self.shapes[key]
        ]
        if wrong:
            raise ValueError(f"{other.repo} is not {self.name}: its config says {', '.join(wrong)}")


def _class_defaults(model_type: str) -> dict[str, Any]:
    """The config of a kind of model that says nothing itself."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().to_dict()


def _size(section: object, field: str, where: str) -> int:
    """A size that a section of a config states."""
    value = section.get(field) if isinstance(section, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        stated = repr(value) if isinstance(section, dict) and field in section else "missing"
        raise ValueError(f"{where}.{field} is {stated}; needed: a whole number from 1")
    return value


def _levels(vision: dict[str, Any], depth: int, file: str) -> tuple[int, ...]:
    """The blocks after which DeepStack taps a tower, each one of its blocks."""
    field, value = TAPS, vision.get(TAPS)
    blocks = value if isinstance(value, list | tuple) else ()
    whole = [block for block in blocks if isinstance(block, int) and not isinstance(block, bool)]
    levels = tuple(block for block in whole if 0 <= block < depth)
    if levels != tuple(blocks) or len(levels) != len(LEVEL_NAMES) or list(levels) != sorted(set(levels)):
        stated = repr(value) if field in vision else "missing"
        raise ValueError(
            f"{file}: vision_config.{field} is {stated}; needed: {len(LEVEL_NAMES)} rising block numbers "
            f"from 0 to {depth - 1}"
        )
    return levels


@dataclass(frozen=True)
class EditorSpec:
    """One Qwen-Image-Edit checkpoint."""

    name: str
    """Short name, as users write it."""
    repo: str
    """Hub id, local folder, or `builtin:` location."""
    pipeline_class: str
    """Name of the diffusers pipeline class."""
    condition_area: int | None = None
    """px² of the image that the target tower sees; None leaves diffusers' own constant."""
    vae_area: int | None = None
    """px² of the image that the VAE encodes and of the output; None leaves diffusers' own constant."""
    condition_step: int = 32
    """px: the sides of the image that the target tower sees are multiples of it; 32 is diffusers' own."""
    transformer_params: float = 20.43
    """10⁹ parameters of the DiT; 0 where it is too small to plan for."""
    encoder_params: float = 8.29
    """10⁹ parameters of the text encoder."""
    revision: str | None = None
    """Branch, tag or commit; None is the default branch."""
    few_steps: tuple[tuple[int, str], ...] = ()
    """LoRAs that edit in few steps without guidance: how many, and where each lies."""
    few_step_lora: str | None = None
    """The one that is loaded with the editor, with its scheduler."""

    @property
    def max_aspect_ratio(self) -> float:
        """The longest image, its long side by its short one, whose sides the pipeline does not round to 0."""
        single = self.pipeline_class == "QwenImageEditPipeline"  # its tower sees the output's size
        condition = self.condition_area or (STOCK_AREA if single else STOCK_CONDITION_AREA)
        areas = ((condition, self.condition_step), (self.vae_area or STOCK_AREA, STOCK_STEP))
        return min(4 * area / step**2 for area, step in areas)


@dataclass(frozen=True)
class Family:
    """Models that belong together, with the settings that suit them."""

    name: str
    source: ModelSpec
    target: ModelSpec
    editor: EditorSpec
    bridge_rank: int
    """Default rank of a bridge between the two."""
    steps: int
    """Default denoising steps."""
    true_cfg_scale: float = 4.0
    """Default guidance scale; guidance needs a negative prompt too."""
    negative_prompt: str | None = " "
    image_size: int = 448
    """px of the synthetic test image's side."""
    synthetic_only: bool = False
    """Whether its models know the synthetic world alone: Latin capitals, no photographs."""
    chat_template: bool = True
    """Whether its language model follows a chat template; else it reads the editor's template alone."""
    reply_tokens: int = 1
    """How many of a prompt's last tokens were trained to predict the reply's first tokens, one each."""


def check_seed(seed: object) -> int:
    """A seed that every random generator of the toolkit takes, as a plain `int`.

    Raises:
        TypeError: no whole number. ValueError: outside 0 to `MAX_SEED`.
    """
    number = whole_number(seed)
    if number is None:
        raise TypeError(f"seed is a whole number, not {seed!r}")
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"seed is {number}; needed: a whole number from 0 to {MAX_SEED} (2**63 - 1)")
    return number


def whole_number(value: object) -> int | None:
    """The value of a whole number, NumPy's included; None for anything else, `True` included."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # NumPy's arrays of more than one number, and its booleans
        return None


def check_prompt(prompt: object, name: str = "the prompt") -> str:
    """Check that a text for the language model says something, and nothing to its chat template.

    Args:
        prompt: an instruction, a question or an answer.
        name: what it is, for messages.

    Raises:
        TypeError: not a string.
        ValueError: blank, with a token of the chat template such as `<|image_pad|>`, or with half a surrogate
            pair, which is no text.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{name} is not a string but a {type(prompt).__name__}")
    if not prompt.strip():
        raise ValueError(f"{name} is empty: say what to change")
    if token := TEMPLATE_TOKEN.search(prompt):
        raise ValueError(f"{name} has {token[0]}, a token of the models' chat template: leave it out")
    if half := SURROGATE.search(prompt):
        raise ValueError(f"{name} has half a surrogate pair ({half[0]!r}): it was decoded wrongly")
    return prompt


def step_seed(seed: int, step: int) -> int:
    """The seed of one training step, within the 64 bits that PyTorch takes however large `seed` is."""
    return (seed * 1_000_003 + step) % 2**64


def cache_home() -> Path:
    """Folder for everything the toolkit keeps between runs; `QWEN_VISION_BRIDGE_HOME` moves it."""
    if home := os.environ.get("QWEN_VISION_BRIDGE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qwen-vision-bridge"
