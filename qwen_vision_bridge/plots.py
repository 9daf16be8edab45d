"""Comparison sheets and maps of the level weights, drawn without a display."""

from __future__ import annotations

import io
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ft2font import FT2Font

AMPLIFICATION = 5
PANEL_INCHES = 2.8
DPI = 110
LIMITS = 0.4, 3.0  # of a panel's width by its height: an extreme image must not dwarf the others
EQUAL = 0.05  # weights that differ less from their mean show no preference

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari")
"""For prompts, where they are installed: matplotlib's own, and Debian's for other writing."""
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")

Known = tuple[Image.Image, bool, bool]
"""The right edit, and whether baseline and enhanced are right."""


def comparison_sheet(
    inputs: Sequence[Image.Image],
    baseline: Image.Image,
    enhanced: Image.Image,
    prompt: str,
    seed: int,
    strength: float,
    caption: str,
    known: Known | None = None,
) -> Image.Image:
    """Draw a labelled sheet: inputs, the target where it is known, baseline and enhanced with their verdicts.

    Below them: the difference of the two edits, and what each changed of the input, times `AMPLIFICATION`.

    Raises:
        ValueError: baseline and enhanced of different sizes.
    """
    if baseline.size != enhanced.size:
        raise ValueError(
            f"baseline is {baseline.size}, enhanced is {enhanced.size}: an edit pair has one size"
        )
    references = [(f"reference {number}", image) for number, image in enumerate(inputs[:-1], start=1)]
    marks = ["", ""] if known is None else [" ✓ right" if right else " ✗ wrong" for right in known[1:]]
    top = [
        *references,
        (f"input {_size(inputs[-1])}", inputs[-1]),
        *([] if known is None else [("target", known[0])]),
        (f"baseline{marks[0]} {_size(baseline)}", baseline),
        (f"with the bridge{marks[1]} {_size(enhanced)}", enhanced),
    ]
    edited = inputs[-1].resize(baseline.size)
    below = [
        _difference("baseline against bridge", baseline, enhanced),
        *([] if known is None else [_difference("target against input", edited, known[0])]),
        _difference("changed by the baseline", edited, baseline),
        _difference("changed with the bridge", edited, enhanced),
    ]
    widths = [min(max(image.width / image.height, LIMITS[0]), LIMITS[1]) for _, image in top]
    figure = Figure(
        figsize=(PANEL_INCHES * sum(widths) + 0.2, 2 * PANEL_INCHES + 1.3), dpi=DPI, layout="constrained"
    )
    title = textwrap.wrap(drawable(f"“{prompt}”"), int(30 * sum(widths)))[:3]
    figure.suptitle("\n".join(title), fontsize=11, family=fonts(), parse_math=False)
    rows = figure.subplots(2, len(top), width_ratios=widths, squeeze=False)
    for place in np.ndindex(rows.shape):
        rows[place].set_axis_off()
    for axis, (name, image) in zip(rows[0], top, strict=True):
        _show(axis, image, name)
    for axis, (name, image) in zip(rows[1][len(references) :], below, strict=True):
        _show(axis, image, name)
    figure.supxlabel(f"seed {seed} · strength {strength:g} · {caption}", fontsize=8, color="0.35")
    return to_image(figure)


def _size(image: Image.Image) -> str:
    return f"({image.width}×{image.height})"


def _difference(name: str, first: Image.Image, second: Image.Image) -> tuple[str, Image.Image]:
    """The amplified difference of two images, and its mean in the title."""
    second = second if second.size == first.size else second.resize(first.size)
    difference = np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16))
    amplified = Image.fromarray(np.clip(difference * AMPLIFICATION, 0, 255).astype(np.uint8))
    return f"{name} ×{AMPLIFICATION}, mean {difference.mean():.1f}", amplified


def attention_figure(
    image: Image.Image,
    weights: np.ndarray,
    levels: Sequence[str],
    prompt: str = "",
    caption: str = "",
    shares: np.ndarray | None = None,
) -> Image.Image:
    """Draw over the image how much of each token's update comes from each level.

    Args:
        image: what the source saw.
        weights: attention over the levels, (gh, gw, L), summing to 1 over L.
        levels: their names.
        prompt: of the edit, for the title.
        shares: norms of the levels' updates over their sum, (gh, gw, L), which say what reaches the edit;
            None draws the attention weights.

    Raises:
        ValueError: weights of another number of levels.
    """
    if weights.ndim != 3 or weights.shape[-1] != len(levels):
        raise ValueError(
            f"weights of shape {weights.shape} do not fit the {len(levels)} levels {tuple(levels)}"
        )
    drawn, what = (weights, "attention weight") if shares is None else (shares, "share of the update")
    columns = len(levels) + 1
    height = PANEL_INCHES * min(image.height / image.width, 2.0) + 1.5
    figure = Figure(figsize=(PANEL_INCHES * columns + 0.8, height), dpi=DPI, layout="constrained")
    title = textwrap.wrap(drawable(f"“{prompt}”") if prompt else what, 30 * columns)[:2]
    figure.suptitle("\n".join(title), fontsize=11, family=fonts(), parse_math=False)
    axes = np.atleast_1d(figure.subplots(1, columns))
    _show(axes[0], image, "input")
    extent = (0, image.width, image.height, 0)
    low, high = float(drawn.min()), float(drawn.max())
    for index, (axis, name) in enumerate(zip(axes[1:], levels, strict=True)):
        means = f"{drawn[..., index].mean():.2f} of the update, " if shares is not None else ""
        _show(axis, image.convert("L"), f"{name}: {means}weight {weights[..., index].mean():.2f}")
        overlay = axis.imshow(
            drawn[..., index],
            cmap="viridis",
            alpha=0.65,
            extent=extent,
            vmin=low,
            vmax=high,
            interpolation="nearest",
        )
    figure.colorbar(overlay, ax=axes[1:].tolist(), label=what, shrink=0.8)
    gh, gw = weights.shape[:2]
    notes = [preference(weights, levels), f"{gh}×{gw} tokens", caption]
    figure.supxlabel(" · ".join(filter(None, notes)), fontsize=8, color="0.35")
    return to_image(figure)


def preference(weights: np.ndarray, levels: Sequence[str]) -> str:
    """What the mean attention weights (…, L) say in words: which level leads, or that none does."""
    means = weights.reshape(-1, weights.shape[-1]).mean(0)
    if np.abs(means - means.mean()).max() < EQUAL:
        return "the attention weights are nearly equal: the bridge prefers no level"
    return f"the bridge attends most to {levels[int(means.argmax())]}"


@cache
def fonts() -> list[str]:
    """Names of the fonts for prompts that are installed here."""
    installed = set(font_manager.get_font_names())
    return [name for name in FONTS if name in installed]


def drawable(text: str) -> str:
    """The text with letters that no font here has, which would be boxes, replaced by what would draw them."""
    parts = []
    for known, letters in groupby(text, _has_glyph):
        part = "".join(letters)
        if not known:
            named = unicodedata.name(part[0], "")
            package = "fonts-noto-cjk" if named.startswith(CJK) else "fonts-noto-core"
            part = f"[{len(part)} letters, drawn with {package}]"
        parts.append(part)
    return "".join(parts)


def _has_glyph(letter: str) -> bool:
    return letter.isspace() or any(font.get_char_index(ord(letter)) for font in _loaded_fonts())


@cache
def _loaded_fonts() -> list[FT2Font]:
    return [font_manager.get_font(font_manager.findfont(name)) for name in fonts()]


def to_image(figure: Figure) -> Image.Image:
    """Render a figure to an RGB image."""
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _show(axis: Axes, image: Image.Image, title: str) -> None:
    axis.imshow(image, cmap="gray" if image.mode == "L" else None, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
