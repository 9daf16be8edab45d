"""Arrays and strings in, floats out: one function a metric, its source cited.

An image is a PIL image or a uint8 array (H, W, 3); a mask is a bool array (H, W) with at least one True.
Anything else raises ValueError (TypeError where it is no image at all), naming what was given and what is
needed. Positions are pixels, (x, y) from the top left corner: the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...synthetic.scene import COLOURS, RGB, SceneObject
from .ocr import ImageOrArray
from .ocr import pixels_of as _pixels
from .ocr import read_text as read_text

SSIM_REACH = 5  # px: half the window of the structural similarity


def _pair(a: ImageOrArray, b: ImageOrArray) -> tuple[np.ndarray, np.ndarray]:
    first, second = _pixels(a, "the first image"), _pixels(b, "the second image")
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


# --- text ------------------------------------------------------------------------------------------------


def normalise_text(text: str) -> str:
    """Text as it is compared: without spaces, case-folded, in Unicode form NFKC (full-width as plain)."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_text(read: str, expected: str) -> float:
    """1.0 where both are equal after `normalise_text`, else 0.0: word accuracy, ICDAR 2015 task 4.3."""
    return float(normalise_text(read) == normalise_text(expected))


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein(a, b) / max(len(a), len(b)) after `normalise_text`, in [0, 1]; 1.0 if both are empty.

    Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals", 1966; normalised
    as in ICDAR 2019's 1-NED. Computed by rapidfuzz.
    """
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(normalise_text(a), normalise_text(b)))


def source_text_left(read: str, source: str, expected: str) -> float:
    """1.0 where the old text is still read somewhere and the new one does not hold it, else 0.0.

    The fault that TextEdit's classic track punishes (`classic_metrics_eval.py`, 2026): words are added, and
    those to be replaced stay. ValueError for an empty source text.
    """
    old, new = normalise_text(source), normalise_text(expected)
    if not old:
        raise ValueError(f"the source text {source!r} is empty; needed: the text that was to be changed")
    return float(old in normalise_text(read) and old not in new)


# --- space -----------------------------------------------------------------------------------------------


class FoundObject(NamedTuple):
    """A flat patch of one colour: the colour's name, centre of area (x, y) in pixels, area in pixels."""

    colour: str
    centroid: tuple[float, float]
    area: float


def colour_map(
    image: ImageOrArray, colours: Mapping[str, RGB] = COLOURS, tolerance: float = 25.0
) -> np.ndarray:
    """Index of the nearest colour in CIELAB (CIE76) of every pixel, int (H, W); -1 where all are farther than
    `tolerance`."""
    from skimage.color import rgb2lab

    palette = rgb2lab(np.array(list(colours.values()), dtype=np.uint8)[None])[0]  # (C, 3)
    distances = np.linalg.norm(rgb2lab(_pixels(image))[..., None, :] - palette, axis=-1)  # (H, W, C)
    return np.where(distances.min(-1) <= tolerance, distances.argmin(-1), -1)


def find_objects(
    image: ImageOrArray,
    colours: Mapping[str, RGB] = COLOURS,
    tolerance: float = 25.0,
    min_area: float | None = None,
) -> list[FoundObject]:
    """The patches of the given colours, largest first.

    A pixel belongs to its nearest colour in CIELAB (CIE76) when that is within `tolerance`. An opening with
    a 3 × 3 square drops rims; connected components below `min_area` pixels (by default 0.3 % of the image)
    are dropped too.
    """
    from scipy import ndimage

    nearest = colour_map(image, colours, tolerance)
    least = 0.003 * nearest.size if min_area is None else min_area
    found = []
    for index, colour in enumerate(colours):
        patches, count = ndimage.label(ndimage.binary_opening(nearest == index, np.ones((3, 3))))
        areas = np.bincount(patches.ravel(), minlength=count + 1)
        for patch in np.flatnonzero(areas[1:] >= max(least, 1)) + 1:
            y, x = np.nonzero(patches == patch)
            found.append(
                FoundObject(colour, (float(x.mean()) + 0.5, float(y.mean()) + 0.5), float(areas[patch]))
            )
    return sorted(found, key=lambda item: -item.area)


def place_distances(image: ImageOrArray, expected: Sequence[SceneObject]) -> list[float | None]:
    """How far each expected object is from the patch assigned to it, px; None where it is lost."""
    places = found_places(image, expected)
    return [
        None if place is None else float(np.hypot(*np.subtract(place, item.centre)))
        for item, place in zip(expected, places, strict=True)
    ]


def found_places(image: ImageOrArray, expected: Sequence[SceneObject]) -> list[tuple[float, float] | None]:
    """Where the patch assigned to each expected object is, (x, y) px; None where it is lost."""
    from scipy.optimize import linear_sum_assignment

    found: list[tuple[float, float] | None] = [None] * len(expected)
    # A tenth of the surrounding disc is about a quarter of the slimmest shape: less is a scrap.
    least = min((0.1 * np.pi * item.radius**2 for item in expected), default=None)
    patches = find_objects(image, min_area=least)
    for colour in {item.colour for item in expected}:
        wanted = [index for index, item in enumerate(expected) if item.colour == colour]
        centres = np.array([expected[index].centre for index in wanted])  # (wanted, 2)
        places = np.array([patch.centroid for patch in patches if patch.colour == colour]).reshape(-1, 2)
        lengths = np.linalg.norm(centres[:, None] - places, axis=-1)  # (wanted, found)
        for row, column in zip(*linear_sum_assignment(lengths), strict=True):
            found[wanted[row]] = (float(places[column, 0]), float(places[column, 1]))
    return found


def centroid_error(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float:
    """Mean distance in pixels between where objects should be and where patches of their colours are.

    Objects and patches of a colour are paired for the least total distance (Kuhn, "The Hungarian method",
    1955). A lost object counts as the image's diagonal, the largest distance there is: losing an object
    never improves the score, and means and intervals stay finite; `objects_lost` tells such cases apart.
    The image must have the size of the scene that the objects are from.
    """
    if not expected_objects:
        raise ValueError("expected_objects is empty; needed: at least one object to look for")
    diagonal = float(np.hypot(*_pixels(image).shape[:2]))
    distances = place_distances(image, expected_objects)
    return float(np.mean([diagonal if distance is None else distance for distance in distances]))


def objects_lost(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float:
    """How many of the expected objects have no patch of their colour in the image."""
    return float(sum(distance is None for distance in place_distances(image, expected_objects)))


def objects_invented(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float:
    """How many patches of shapes' colours there are beyond one for each expected object of that colour.

    Patches below a quarter of the smallest expected object's disc are scraps and do not count.
    """
    least = min((0.25 * np.pi * item.radius**2 for item in expected_objects), default=None)
    seen = Counter(patch.colour for patch in find_objects(image, min_area=least))
    wanted = Counter(item.colour for item in expected_objects)
    return float((seen - wanted).total())


def object_iou(image: ImageOrArray, target: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float:
    """Mean intersection over union of the areas that the expected objects' colours cover in image and
    target, in [0, 1]: Jaccard, "The distribution of the flora in the alpine zone", 1912."""
    if not expected_objects:
        raise ValueError("expected_objects is empty; needed: at least one object to look for")
    first, second = (colour_map(shown) for shown in _pair(image, target))
    indices = [list(COLOURS).index(name) for name in sorted({item.colour for item in expected_objects})]
    areas = [(first == index, second == index) for index in indices]
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in areas]))


def iou_by_object(
    image: ImageOrArray, target: ImageOrArray, expected_objects: Sequence[SceneObject]
) -> float:
    """Mean over the target's objects of each one's own intersection over union with the patch assigned to it.

    Patches of a colour are paired for the greatest total (Kuhn 1955); a lost object counts as 0, and so does
    one that stands wholly elsewhere, so this asks for each object what `object_iou` asks for a colour.
    """
    from scipy.optimize import linear_sum_assignment

    if not expected_objects:
        raise ValueError("expected_objects is empty; needed: at least one object to look for")
    seen, wanted = (colour_map(shown) for shown in _pair(image, target))
    least = 0.1 * np.pi * min(item.radius for item in expected_objects) ** 2
    overlaps: list[float] = []
    for colour in sorted({item.colour for item in expected_objects}):
        index = list(COLOURS).index(colour)
        truth, found = (_patches(shown == index, least) for shown in (wanted, seen))
        table = np.array([[(a & b).sum() / (a | b).sum() for b in found] for a in truth])  # (truth, found)
        own = np.zeros(len(truth))
        if len(found):
            rows, columns = linear_sum_assignment(table, maximize=True)
            own[rows] = table[rows, columns]
        overlaps += own.tolist()
    return float(np.mean(overlaps))


def _patches(where: np.ndarray, least: float) -> list[np.ndarray]:
    """Connected parts of at least so many px, bool (H, W) each, with what they enclose, such as a letter."""
    from scipy import ndimage

    labels, count = ndimage.label(ndimage.binary_opening(where, np.ones((3, 3))))
    parts = (ndimage.binary_fill_holes(labels == number) for number in range(1, count + 1))
    return [part for part in parts if part.sum() >= least]


def relations_kept(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float | None:
    """Share of the relations left of / above between expected objects that the found ones satisfy.

    Pairs less than an eighth of the side apart along an axis have no relation there; a pair with a lost
    object satisfies none. None where there is no relation to satisfy. After SpatialSense and VISOR (Gokhale
    et al. 2022), which ask the same of detected objects.
    """
    size = _pixels(image).shape[1]
    places = found_places(image, expected_objects)
    kept = []
    for (item, place), (other, beside) in itertools.combinations(
        zip(expected_objects, places, strict=True), 2
    ):
        for axis in (0, 1):
            wanted = other.centre[axis] - item.centre[axis]
            if abs(wanted) >= size / 8:
                both = place is not None and beside is not None
                kept.append(both and (beside[axis] - place[axis]) * wanted > 0)
    return float(np.mean(kept)) if kept else None


# --- detail ----------------------------------------------------------------------------------------------


def shrink(mask: np.ndarray, margin: int = SSIM_REACH) -> np.ndarray:
    """The mask (H, W) without its outermost px, so that a window on it sees none of what lies beside it;
    the mask as it is where nothing would be left."""
    from scipy.ndimage import binary_erosion

    inner = binary_erosion(mask, np.ones((3, 3), bool), iterations=margin, border_value=1)
    return inner if inner.any() else mask


def masked_ssim(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float:
    """Mean over the mask of the structural similarity map, all channels, in [-1, 1]; 1.0 for equal images.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004: Gaussian window, sigma 1.5,
    population statistics, by scikit-image. Each value sees an 11 × 11 window, so changes up to 5 px outside
    the mask are felt inside it. Raises ValueError below 11 pixels a side.
    """
    from skimage.metrics import structural_similarity

    first, second = _pair(a, b)
    if min(first.shape[:2]) < 11:
        raise ValueError(f"the images are {first.shape[1]} × {first.shape[0]} px; needed: at least 11 × 11")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, similarity = structural_similarity(
        first, second, channel_axis=-1, data_range=255, full=True, **options
    )
    return float(similarity[_checked(mask, first)].mean())


def masked_psnr(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the mask in dB: 10·log10(255² / mean squared error); inf if equal."""
    first, second = _pair(a, b)
    inside = _checked(mask, first)
    error = np.mean((first[inside].astype(float) - second[inside]) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def mean_abs_difference(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray | None = None) -> float:
    """Mean absolute difference in 8-bit grey levels (0 to 255), over the mask where there is one."""
    first, second = _pair(a, b)
    inside = np.s_[:] if mask is None else _checked(mask, first)
    return float(np.abs(first[inside].astype(float) - second[inside]).mean())


def texture_kept(a: ImageOrArray, b: ImageOrArray, mask: np.ndarray) -> float | None:
    """Correlation of the fine structure of two images over the mask, in [-1, 1]; 1.0 where it is the same.

    The structure is the luminance less its Gaussian blur of 2 px; its normalised cross-correlation (Lewis
    1995) ignores colour and brightness, so a repainted texture counts as kept and a smoothed one does not.
    None where either image is without structure there.
    """
    from scipy.ndimage import gaussian_filter

    first, second = _pair(a, b)
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

    first, second = _pair(a, b)
    inside = _checked(mask, first)
    return float(deltaE_ciede2000(rgb2lab(first[inside]), rgb2lab(second[inside])).mean())


def colour_error(image: ImageOrArray, mask: np.ndarray, rgb: RGB) -> float:
    """Mean colour difference to `rgb` over the mask in CIEDE2000 units: about 1 is just noticeable.

    Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005, by scikit-image; sRGB under D65.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    pixels = _pixels(image)
    inside = pixels[_checked(mask, pixels)]  # (P, 3)
    wanted = np.broadcast_to(np.array(rgb, dtype=np.uint8), inside.shape)
    return float(deltaE_ciede2000(rgb2lab(inside), rgb2lab(wanted)).mean())
