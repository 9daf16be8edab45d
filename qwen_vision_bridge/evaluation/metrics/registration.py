"""How a whole image shifted, grew or turned: registration of an edit onto its input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

WORKING_SIDE = 256  # px: larger images are reduced to this before they are registered
BLURS = (4.0, 2.0, 1.0)  # px of the working image, coarse to fine
STEPS = 25  # at most, for each blur
SETTLED = 1e-4  # px of the rim: smaller steps end a blur
AGREEMENT = 0.4  # correlation of the registered images below which nothing was registered


class Drift(NamedTuple):
    """The similarity transform that best takes the input onto the edit."""

    right_px: float
    """How far the content moved to the right, px of the given images."""
    down_px: float
    scale: float
    """Above 1: the content grew."""
    rotation_deg: float
    """Clockwise as seen on the screen."""

    @property
    def shift_px(self) -> float:
        """Length of the shift, px."""
        return float(np.hypot(self.right_px, self.down_px))

    @property
    def scale_percent(self) -> float:
        """How much the content grew or shrank."""
        return abs(self.scale - 1) * 100


def measure_drift(image: Image.Image, original: Image.Image) -> Drift | None:
    """Register an edit on its input.

    Gauss-Newton on the luminance over shift, scale and rotation, coarse to fine (Lucas and Kanade 1981; Baker
    and Matthews 2004), started from the phase correlation of the two (Kuglin and Hines 1975). Pixels that the
    edit changed disagree and are weighed down (Geman and McClure 1985), so no mask is needed.

    Returns:
        None where it has nothing to hold on to: a flat image, or one that has nothing of the input left.

    Raises:
        ValueError: images of different sizes.
    """
    if image.size != original.size:
        raise ValueError(f"the images are {image.size} and {original.size} px; needed: the same size")
    factor = max(max(original.size) / WORKING_SIDE, 1.0)
    size = tuple(max(round(side / factor), 16) for side in original.size)
    moved, fixed = (
        np.asarray(shown.convert("L").resize(size, Image.Resampling.BOX), float)
        for shown in (image, original)
    )
    if min(moved.std(), fixed.std()) < 1.0:
        return None
    half = max(size) / 2
    parameters = np.array([0.0, 0.0, *_start(moved, fixed)])
    for blur in BLURS:
        refined = _refine(moved, fixed, parameters, blur, half)
        if refined is None:
            return None
        parameters = refined
    grown, turned, right, down = parameters
    grown, turned = grown / half, turned / half
    return Drift(
        float(right * factor),
        float(down * factor),
        float(np.hypot(1 + grown, turned)),
        float(np.degrees(np.arctan2(turned, 1 + grown))),
    )


def _start(moved: np.ndarray, fixed: np.ndarray) -> tuple[float, float]:
    """The whole-pixel shift (right, down) of phase correlation, where the images then agree better."""
    from skimage.registration import phase_cross_correlation

    window = np.outer(np.hanning(fixed.shape[0]), np.hanning(fixed.shape[1]))
    shift, _, _ = phase_cross_correlation(
        (fixed - fixed.mean()) * window, (moved - moved.mean()) * window, normalization=None
    )
    down, right = (-shift).astype(int)
    back = np.roll(moved, (-down, -right), (0, 1))
    better = np.abs(back - fixed).mean() < np.abs(moved - fixed).mean()
    return (float(right), float(down)) if better else (0.0, 0.0)


def _refine(
    moved: np.ndarray, fixed: np.ndarray, parameters: np.ndarray, blur: float, half: float
) -> np.ndarray | None:
    """One blur's Gauss-Newton steps.

    Args:
        parameters: growth and turn as px at the rim, shift right and down in px; (4,).

    Returns:
        Better parameters, or None where the steps run away.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    moved, fixed = gaussian_filter(moved, blur), gaussian_filter(fixed, blur)
    y, x = np.indices(fixed.shape, dtype=float)
    u, v = (x - (x.shape[1] - 1) / 2) / half, (y - (x.shape[0] - 1) / 2) / half
    rise, slope = np.gradient(moved)
    for _ in range(STEPS):
        grown, turned, right, down = parameters
        place = np.array([y + grown * v + turned * u + down, x + grown * u - turned * v + right])
        inside = ((place >= 0) & (place <= np.array(fixed.shape)[:, None, None] - 1)).all(0)
        if inside.mean() < 0.25:
            return None
        seen, gx, gy = (map_coordinates(layer, place[:, inside], order=1) for layer in (moved, slope, rise))
        error = seen - fixed[inside]
        spread = max(1.4826 * float(np.median(np.abs(error))), 1.0)  # a robust standard deviation
        weight = 1 / (1 + (error / (2 * spread)) ** 2) ** 2
        rows = np.stack([gx * u[inside] + gy * v[inside], gy * u[inside] - gx * v[inside], gx, gy])  # (4, P)
        normal = (rows * weight) @ rows.T
        step = np.linalg.solve(normal + 1e-6 * np.trace(normal) * np.eye(4), -(rows * weight) @ error)
        parameters = parameters + step
        if np.abs(step).max() < SETTLED:
            break
    agreement = np.corrcoef(seen, fixed[inside])[0, 1] if seen.std() > 0 else 0.0
    return parameters if np.abs(parameters[:2]).max() < half / 2 and agreement > AGREEMENT else None
