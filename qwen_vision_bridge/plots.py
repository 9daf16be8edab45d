"""Comparison sheets and maps of the level weights, drawn without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AMPLIFICATION = 5
PANEL_INCHES = 3.2
DPI = 110


def comparison_sheet(
    inputs: Sequence[Image.Image],
    baseline: Image.Image,
    enhanced: Image.Image,
    prompt: str,
    seed: int,
    strength: float,
    caption: str,
) -> Image.Image:
    """Draw a labelled sheet: input(s), baseline, enhanced, and their difference times `AMPLIFICATION`.

    Raises:
        ValueError: baseline and enhanced of different sizes.
    """
    if baseline.size != enhanced.size:
        raise ValueError(
            f"baseline is {baseline.size}, enhanced is {enhanced.size}: an edit pair has one size"
        )
    difference = np.abs(np.asarray(baseline, np.int16) - np.asarray(enhanced, np.int16))
    amplified = Image.fromarray(np.clip(difference * AMPLIFICATION, 0, 255).astype(np.uint8))
    names = ["input"] if len(inputs) == 1 else [f"input {number + 1}" for number in range(len(inputs))]
    panels = [*zip(names, inputs, strict=True), ("baseline", baseline), ("enhanced", enhanced)]
    panels.append((f"difference ×{AMPLIFICATION} (mean {difference.mean():.2f} of 255)", amplified))
    figure = _figure(len(panels), [image for _, image in panels])
    figure.suptitle("\n".join(textwrap.wrap(f"“{prompt}”", 40 * len(panels))[:3]), fontsize=11)
    for axis, (name, image) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _show(axis, image, name)
    figure.supxlabel(f"seed {seed} · strength {strength:g} · {caption}", fontsize=8, color="0.35")
    return to_image(figure)


def attention_figure(
    image: Image.Image, weights: np.ndarray, levels: Sequence[str], caption: str = ""
) -> Image.Image:
    """Draw the image, and over it the share of each token's update that came from each level.

    Args:
        image: what the source saw.
        weights: (gh, gw, L), summing to 1 over L.
        levels: their names.

    Raises:
        ValueError: weights of another number of levels.
    """
    if weights.ndim != 3 or weights.shape[-1] != len(levels):
        raise ValueError(
            f"weights of shape {weights.shape} do not fit the {len(levels)} levels {tuple(levels)}"
        )
    columns = len(levels) + 1
    figure = _figure(columns, [image], extra_width=0.8)
    axes = np.atleast_1d(figure.subplots(1, columns))
    _show(axes[0], image, "input")
    extent = (0, image.width, image.height, 0)
    low, high = float(weights.min()), float(weights.max())
    for index, (axis, name) in enumerate(zip(axes[1:], levels, strict=True)):
        share = weights[..., index]
        _show(axis, image.convert("L"), f"{name}: mean {share.mean():.3f}")
        overlay = axis.imshow(
            share, cmap="viridis", alpha=0.65, extent=extent, vmin=low, vmax=high, interpolation="nearest"
        )
    figure.colorbar(overlay, ax=axes[1:].tolist(), label="level weight", shrink=0.8)
    gh, gw = weights.shape[:2]
    figure.supxlabel(f"{gh}×{gw} tokens{' · ' + caption if caption else ''}", fontsize=8, color="0.35")
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    """Render a figure to an RGB image."""
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _figure(columns: int, images: Sequence[Image.Image], extra_width: float = 0.0) -> Figure:
    """A figure for one row of panels, as tall as the tallest image needs."""
    height = PANEL_INCHES * max(min(image.height / image.width, 2.0) for image in images) + 0.9
    return Figure(figsize=(PANEL_INCHES * columns + extra_width, height), dpi=DPI, layout="constrained")


def _show(axis: Axes, image: Image.Image, title: str) -> None:
    axis.imshow(image, cmap="gray" if image.mode == "L" else None, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
