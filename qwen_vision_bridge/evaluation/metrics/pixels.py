"""Compare the pixels of two images, one function a metric with its source cited; and the regions to compare.

An image is a PIL image or a uint8 array (H, W, 3); a mask is a bool array (H, W) with at least one True.
Anything else raises ValueError (TypeError where it is no image at all), naming what was given and what is
needed.
"""

from __future__ import annotations

import numpy as np

from ...case import RGB, Box
from .ocr import ImageOrArray, pixels_of

SSIM_REACH = 5  # px: half the window of the structural similarity
# Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004.
SSIM_OPTIONS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
VISIBLE = 24  # grey levels in some channel: less is no change, but the codec's


def same_size(a: ImageOrArray, b: ImageOrArray) -> tuple[np.ndarray, np.ndarray]:
    """Both images as uint8 (H, W, 3). Raises ValueError where their sizes differ."""
    first, second = pixels_of(a, "the first image"), pixels_of(b, "the second image")
    if first.shape != second.shape:
        sizes = (f"{pixels.shape[1]} × {pixels.shape[0]} px" for pixels in (first, second))
        raise ValueError("the images differ in size: {} and {}; needed: the same size".format(*sizes))
    return first, second


def _checked(mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    if mask.dtype != bool or mask.shape != pixels.shape[:2]:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}; needed: bool {pixels.shape[:2]}, as the image")
    if not mask.any():
        raise ValueError("mask is False everywhere; needed: at least one pixel to measure")
    return mask


def shrink(mask: np.ndarray, margin: int = SSIM_REACH) -> np.ndarray:
    """The mask (H, W) without its outermost px, so that a window on it sees none of what lies beside it;
    the mask as it is where nothing would be left."""
    from scipy.ndimage import binary_erosion

    inner = binary_erosion(mask, np.ones((3, 3), bool), iterations=margin, border_value=1)
    return inner if inner.any() else mask


def masked_ssim(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float:
    """Mean over the mask of the structural similarity map, all channels, in [-1, 1]; 1.0 for equal images.

    By scikit-image, with the window and statistics of Wang et al. 2004. Each value sees an 11 × 11 window, so
    changes up to 5 px outside the mask are felt inside it. Raises ValueError below 11 pixels a side.
    """
    from skimage.metrics import structural_similarity

    first, second = same_size(a, b)
    if min(first.shape[:2]) < 11:
        raise ValueError(f"the images are {first.shape[1]} × {first.shape[0]} px; needed: at least 11 × 11")
    _, similarity = structural_similarity(first, second, channel_axis=-1, data_range=255, **SSIM_OPTIONS)
    return float(similarity[_checked(mask, first)].mean())


def masked_psnr(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the mask in dB: 10·log10(255² / mean squared error); inf if equal."""
    first, second = same_size(a, b)
    inside = _checked(mask, first)
    error = np.mean((first[inside].astype(float) - second[inside]) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def mean_abs_difference(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray | None = None) -> float:
    """Mean absolute difference in 8-bit grey levels (0 to 255), over the mask where there is one."""
    first, second = same_size(a, b)
    inside = np.s_[:] if mask is None else _checked(mask, first)
    return float(np.abs(first[inside].astype(float) - second[inside]).mean())


def texture_kept(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float | None:
    """Correlation of the fine structure of two images over the mask, in [-1, 1]; 1.0 where it is the same.

    The structure is the luminance less its Gaussian blur of 2 px; its normalised cross-correlation (Lewis
    1995) ignores colour and brightness, so a repainted texture counts as kept and a smoothed one does not.
    None where either image is without structure there.
    """
    from scipy.ndimage import gaussian_filter

    first, second = same_size(a, b)
    inside = _checked(mask, first)
    fine = []
    for pixels in (first, second):
        luminance = pixels.astype(float) @ (0.299, 0.587, 0.114)
        detail = (luminance - gaussian_filter(luminance, 2.0))[inside]
        fine.append(detail - detail.mean())
    norm = float(np.linalg.norm(fine[0]) * np.linalg.norm(fine[1]))
    return float(fine[0] @ fine[1] / norm) if norm > 1e-6 * inside.sum() else None


def colour_difference(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float:
    """Mean over the mask of the pixels' CIEDE2000 difference; see `colour_error`."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    first, second = same_size(a, b)
    inside = _checked(mask, first)
    return float(deltaE_ciede2000(rgb2lab(first[inside]), rgb2lab(second[inside])).mean())


def colour_error(image: ImageOrArray, mask: np.ndarray, rgb: RGB) -> float:
    """Mean colour difference to `rgb` over the mask in CIEDE2000 units: about 1 is just noticeable.

    Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005, by scikit-image; sRGB under D65.
    """
    pixels = pixels_of(image)
    return colour_difference(pixels, np.broadcast_to(np.array(rgb, dtype=np.uint8), pixels.shape), mask)


def colour_off(a: ImageOrArray, mask_a: np.ndarray, b: ImageOrArray, mask_b: np.ndarray) -> float:
    """CIEDE2000 between the mean CIELAB colours of two regions, masks bool (H, W); see `colour_error`."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    if not (mask_a.any() and mask_b.any()):
        raise ValueError("a mask is False everywhere; needed: at least one pixel to compare")
    means = [rgb2lab(pixels_of(shown)[mask]).mean(0) for shown, mask in ((a, mask_a), (b, mask_b))]
    return float(deltaE_ciede2000(*means))


def visible_change(a: ImageOrArray, b: ImageOrArray) -> np.ndarray:
    """Where two images of one size differ by more than `VISIBLE`, bool (H, W)."""
    first, second = same_size(a, b)
    return (np.abs(first.astype(int) - second) > VISIBLE).any(-1)


def disc(centre: tuple[float, float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """Pixels with their middle within a distance of a place (x, y), bool (H, W) of a size (W, H)."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    return np.hypot(x - centre[0], y - centre[1]) <= radius


def inside_box(box: Box, margin: float, size: tuple[int, int]) -> np.ndarray:
    """Pixels with their middle in a box that is enlarged by a margin, bool (H, W) of a size (W, H)."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    left, top, right, bottom = box
    return (x >= left - margin) & (x <= right + margin) & (y >= top - margin) & (y <= bottom + margin)


def box_overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height) if areas else 0.0
