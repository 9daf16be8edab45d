"""One edit with its arguments checked before any model is loaded, and folders of paired edits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .bridge import VisionBridge, check_strength
from .cache import VisionCache
from .images import Images, image_digest, load_images
from .injection import SITES, LevelAttention, Levels, Site
from .io import check_image_path, digest_of, read_json, write_image, write_json
from .loading.locks import model_lock
from .loading.tower_attention import VisionAttention, check_vision_attention
from .patches import Mrope, photo_note, takes_several, warn_of_photograph, warn_of_stretch
from .specs import STOCK_STEP, EditorSpec, Family, check_prompt, check_seed, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .patches import EditPipeline

FORMAT = "qwen-vision-bridge/pairs/2"
PAIRED = ("generator", "prompt_embeds", "negative_prompt_embeds", "latents", "image", "num_images_per_prompt")
"""Arguments of the stock call that pair baseline and enhanced: users cannot set them."""
MAX_PROMPT_TOKENS = 3000
"""The DiT has positions for 4096 tokens of text, of which template, references and output take a part."""
MAX_SIDE = 8192  # px


@dataclass(frozen=True)
class PipelineOptions:
    """Rare settings of an `EnhancedQwenImageEdit`; baseline and enhanced edits share them."""

    site: Site = "tower"
    """Where the bridge goes in, see `injection.inject`."""
    mrope: Mrope = "fixed"
    """`fixed` gives the text encoder three-axis positions, `stock` leaves diffusers' behaviour."""
    vision_attention: VisionAttention = "batched"
    """`batched` runs both vision towers' attention over many windows and images at once, and fuses their
    layers on a GPU; `stock` leaves transformers' loop."""
    keep_source: bool | None = None
    """Keep the source tower in memory between calls; None leaves it to the memory plan, which keeps it on a
    GPU with room for it and frees it before the DiT runs elsewhere."""
    compiled: bool = False
    """`torch.compile` the source tower's blocks and the bridge: slow to begin with, equal up to rounding."""
    feature_cache: bool | str | Path = True
    """Keep source features on disk, see `VisionCacheExtractor`."""
    fast: int | None = None
    """Edit in so many steps without guidance, by the editor's few-step LoRA: 4, or 8 for released editors."""
    fast_lora: str | Path | None = None
    """Another few-step LoRA: a file, a folder or a hub id."""

    def __post_init__(self) -> None:
        check_vision_attention(self.vision_attention)
        if self.mrope not in ("fixed", "stock"):
            raise ValueError(f'mrope is "fixed" or "stock", not {self.mrope!r}')
        if self.site not in SITES:
            raise ValueError(f"site is one of {', '.join(SITES)}, not {self.site!r}")


@dataclass(frozen=True)
class Edit:
    """One edit, ready to run."""

    images: list[Image.Image]
    prompt: str
    seed: int
    options: Mapping[str, Any]
    """Arguments of the stock call, the family's defaults included."""
    bridge: VisionBridge | None = None
    """None is the baseline."""
    source: VisionCache | Levels | None = None
    """What the bridge sees; None extracts the source's levels of `images`."""
    strength: float = 1.0
    site: Site = "tower"


class EditResult(NamedTuple):
    """An edited image, and the bridge's attention over the levels where there was a bridge."""

    image: Image.Image
    attention: LevelAttention | None


class Comparison(NamedTuple):
    """The same edit without and with the bridge."""

    baseline: Image.Image
    enhanced: Image.Image
    attention: LevelAttention


def check_edit(
    family: Family,
    pipeline_name: str,
    image: Images,
    prompt: str,
    seed: int,
    options: Mapping[str, Any],
    strength: float = 1.0,
) -> Edit:
    """Open an edit's images, check its arguments and complete its options with the family's defaults.

    Args:
        pipeline_name: class of the stock pipeline; the first edit pipeline takes one image only.

    Returns:
        The baseline's edit.

    Raises:
        TypeError, ValueError, FileNotFoundError, OSError: every refusal that needs no model.
    """
    check_prompt(prompt)
    strength, seed = check_strength(strength), check_seed(seed)
    options = check_options(options)
    images = load_images(image, family.target.token_px)
    for one in images:
        check_shape(one, family.editor)
    warn_of_photograph(family, images)
    if not {"height", "width"} & set(options):
        warn_of_stretch(family.editor, images[-1])
    if len(images) > 1 and not takes_several(pipeline_name):
        raise ValueError(f"{pipeline_name} takes one image, got {len(images)}: use Qwen-Image-Edit-2509")
    defaults = {
        "num_inference_steps": family.steps,
        "true_cfg_scale": family.true_cfg_scale,
        "negative_prompt": family.negative_prompt,
    }
    return Edit(images, prompt, seed, {**defaults, **options}, strength=strength)


def check_shape(image: Image.Image, editor: EditorSpec) -> None:
    """Refuse an image so long that the pipeline would round a side to 0 px.

    Raises:
        ValueError: its size, and the longest that the editor takes.
    """
    if max(image.size) >= editor.max_aspect_ratio * min(image.size):
        raise ValueError(
            f"an image is {image.width}×{image.height} px, longer than the {editor.max_aspect_ratio:g}:1 "
            f"that {editor.name} can edit: crop it"
        )


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of an edit that the stock call takes, and make NumPy's numbers plain ones.

    Raises:
        TypeError: an option of another name or type.
        ValueError: one that pairs baseline and enhanced, or a value that gives no image.
    """
    if paired := sorted(set(options) & set(PAIRED)):
        raise ValueError(f"{', '.join(paired)} cannot be set: the pairing of baseline and enhanced does")
    if unknown := sorted(set(options) - set(CHECKS)):
        raise TypeError(f"unknown option {unknown[0]!r} of an edit; known: {', '.join(CHECKS)}")
    return {name: CHECKS[name](name, value) for name, value in options.items()}


def check_length(tokenizer: Callable[[], PreTrainedTokenizerBase], *texts: str | None) -> None:
    """Refuse texts of more tokens than the DiT has positions for; short ones need no tokenizer.

    Raises:
        ValueError: how many tokens one has, and how many fit.
    """
    for text in texts:
        if text and len(text.encode()) > MAX_PROMPT_TOKENS:  # a token has one byte or more
            tokens = len(tokenizer()(text)["input_ids"])
            if tokens > MAX_PROMPT_TOKENS:
                raise ValueError(f"the text has {tokens} tokens, at most {MAX_PROMPT_TOKENS} fit: shorten it")


def check_encoder(pipe: EditPipeline, family: Family) -> None:
    """Refuse an editor whose text encoder has another width than the family's target.

    Raises:
        ValueError: both widths.
    """
    width = pipe.text_encoder.config.vision_config.out_hidden_size
    if width != family.target.out_dim:
        raise ValueError(
            f"{family.editor.repo} has a text encoder of width {width}, "
            f"{family.target.name} has {family.target.out_dim}"
        )


def check_writable(options: Mapping[str, Any], path: str | Path | None) -> None:
    """Refuse an edit whose result is to be written to a path and cannot be; None writes nothing.

    Raises:
        ValueError: arrays or latents are asked for, or a file whose suffix is not that of an image.
    """
    if path is None:
        return
    check_image_path(path)
    if options.get("output_type", "pil") != "pil":
        raise ValueError("this writes image files, so output_type must be left out")


def check_steps(steps: object) -> int:
    """Check a number of denoising steps against what the released scheduler can do.

    Raises:
        ValueError: less than 2; the scheduler stretches its steps to a fixed end and divides by zero for one.
    """
    number = whole_number(steps)
    if number is None or number < 2:
        raise ValueError(f"num_inference_steps is a whole number from 2, not {steps!r}")
    return number


def _scale(name: str, value: object) -> float | None:
    if value is None and name == "guidance_scale":
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is a finite number from 0, not {value!r}")
    return float(value)


def _side(name: str, value: object) -> int | None:
    number = whole_number(value)
    if value is not None and (number is None or not STOCK_STEP <= number <= MAX_SIDE):
        raise ValueError(f"{name} is a whole number of px from {STOCK_STEP} to {MAX_SIDE}, not {value!r}")
    return number


def _sigmas(name: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    sigmas = [float(sigma) for sigma in value]
    falling = all(before > after for before, after in pairwise(sigmas))
    if len(sigmas) < 2 or not falling or not sigmas[-1] > 0 or not sigmas[0] <= 1:
        raise ValueError(f"{name} are two or more falling numbers from 1 to above 0, not {value!r}")
    return sigmas


def _negative(name: str, value: object) -> str | None:
    if value is not None and value != "" and not (isinstance(value, str) and not value.strip()):
        check_prompt(value, name)  # a blank one is the models' own default
    return value  # type: ignore[return-value]  # checked above


def _output(name: str, value: object) -> object:
    if value not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'{name} is "pil", "np", "pt" or "latent", not {value!r}')
    return value


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_inference_steps": lambda _name, value: check_steps(value),
    "true_cfg_scale": _scale,
    "guidance_scale": _scale,
    "negative_prompt": _negative,
    "height": _side,
    "width": _side,
    "sigmas": _sigmas,
    "output_type": _output,
    "attention_kwargs": lambda _name, value: value,
    "callback_on_step_end": lambda _name, value: value,
    "callback_on_step_end_tensor_inputs": lambda _name, value: value,
    "max_sequence_length": lambda _name, value: value,
}
"""Options of the stock call that users may set, each with what checks it."""


def write_sheet(
    path: str | Path, edit: Edit, baseline: Image.Image, enhanced: Image.Image, title: str, family: Family
) -> None:
    """Write a sheet of input, baseline, enhanced and their difference."""
    from .plots import comparison_sheet  # imports matplotlib, which nothing else here needs

    about = " · ".join(filter(None, [title, photo_note(family, edit.images)]))
    sheet = comparison_sheet(edit.images, baseline, enhanced, edit.prompt, edit.seed, edit.strength, about)
    write_image(path, sheet, {"seed": edit.seed, "strength": edit.strength, "models": title})


def compare_pairs(
    compare: Callable[[Edit, Path], Comparison],
    edits: Sequence[Edit],
    folder: Path,
    key: Sequence[Any],
    provenance: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run every edit without and with the bridge; results that the folder holds under the same key are kept.

    Writes `results.json` after each pair, and three images a pair: baseline, enhanced, comparison sheet.

    Args:
        compare: runs one comparison and writes its sheet to a path.
        key: everything but images and prompt that decides a comparison.
        provenance: how the results were made, for the file's head.

    Returns:
        One record a pair, in order.

    Raises:
        ValueError: the folder holds a `results.json` of another kind.
        TypeError: a key that holds something without known content, such as a callback.
    """
    from tqdm import tqdm

    path, records, known = folder / "results.json", [], _read(folder / "results.json")
    for number, edit in enumerate(tqdm(edits, desc="pairs", unit="pair")):
        digests = [image_digest(image) for image in edit.images]
        name = digest_of([key, digests, edit.prompt])
        record = known.get(name)
        if record is None or not all((folder / file).is_file() for file in record["files"].values()):
            measured = _measure(compare, edit, folder, f"{number:03d}-{name[:6]}", provenance)
            record = {"prompt": edit.prompt, "images": digests, **measured}
            with model_lock:  # another thread may have written since
                known = _read(path) | {name: record}
                write_json(path, {"format": FORMAT, "provenance": provenance, "records": known})
        records.append(record)
    return records


def _read(path: Path) -> dict[str, Any]:
    """The records of a folder by key."""
    results: dict[str, Any] = read_json(path) if path.is_file() else {"format": FORMAT, "records": {}}
    if results.get("format") != FORMAT:
        raise ValueError(f"{path} is of another kind or version: give another folder, it is not overwritten")
    return results["records"]


def _measure(
    compare: Callable[[Edit, Path], Comparison], edit: Edit, folder: Path, stem: str, about: dict[str, Any]
) -> dict[str, Any]:
    files = {name: f"{stem}_{name}.png" for name in ("baseline", "enhanced", "comparison")}
    started = time.perf_counter()
    baseline, enhanced, attention = compare(edit, folder / files["comparison"])
    seconds = time.perf_counter() - started
    write_image(folder / files["baseline"], baseline, about | {"arm": "baseline"})
    write_image(folder / files["enhanced"], enhanced, about | {"arm": "enhanced"})
    difference = np.abs(np.asarray(baseline, float) - np.asarray(enhanced, float))
    weights = attention.weights.mean(0).tolist()
    return {
        "files": files,
        "seconds_both": round(seconds, 3),
        "mean_abs_difference": float(difference.mean()),
        "level_weights": dict(zip(attention.levels, weights, strict=True)),
    }
