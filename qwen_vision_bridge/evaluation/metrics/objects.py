"""Where the flat shapes of a synthetic scene are in an image, found by colour alone.

Positions are pixels, (x, y) from the top left corner: the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...case import Box, SceneObject
from ...synthetic.scene import COLOURS
from .ocr import ImageOrArray, pixels_of
from .pixels import box_overlap, same_size

TOLERANCE = 25.0  # CIE76, from a shape's colour


class FoundObject(NamedTuple):
    """A flat patch of one colour: the colour's name, centre of area (x, y) in pixels, area in pixels."""

    colour: str
    centroid: tuple[float, float]
    area: float


def colour_areas(image: ImageOrArray) -> dict[str, np.ndarray]:
    """Where each of `COLOURS` is, bool (H, W): a pixel is of its nearest colour in CIELAB (CIE76), if that is
    within `TOLERANCE`."""
    from skimage.color import rgb2lab

    palette = rgb2lab(np.array(list(COLOURS.values()), dtype=np.uint8)[None])[0]  # (C, 3)
    distances = np.linalg.norm(rgb2lab(pixels_of(image))[..., None, :] - palette, axis=-1)  # (H, W, C)
    nearest = np.where(distances.min(-1) <= TOLERANCE, distances.argmin(-1), -1)
    return {colour: nearest == index for index, colour in enumerate(COLOURS)}


def find_objects(image: ImageOrArray, min_area: float | None = None) -> list[FoundObject]:
    """The patches of the shapes' colours, largest first.

    An opening with a 3 × 3 square drops rims; connected components below `min_area` pixels (by default 0.3 %
    of the image) are dropped too.
    """
    objects = []
    for colour, area in colour_areas(image).items():
        for patch in _patches(area, max(0.003 * area.size if min_area is None else min_area, 1)):
            y, x = np.nonzero(patch)
            objects.append(FoundObject(colour, (float(x.mean()) + 0.5, float(y.mean()) + 0.5), float(len(x))))
    return sorted(objects, key=lambda item: -item.area)


def _patches(where: np.ndarray, least: float = 0) -> list[np.ndarray]:
    """Connected parts of at least so many px without their rims, bool (H, W) each."""
    from scipy import ndimage

    labels, count = ndimage.label(ndimage.binary_opening(where, np.ones((3, 3))))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == number for number in range(1, count + 1) if areas[number] >= least]


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

    places: list[tuple[float, float] | None] = [None] * len(expected)
    # A tenth of the surrounding disc is about a quarter of the slimmest shape: less is a scrap.
    least = min((0.1 * np.pi * item.radius**2 for item in expected), default=None)
    patches = find_objects(image, min_area=least)
    for colour in {item.colour for item in expected}:
        wanted = [index for index, item in enumerate(expected) if item.colour == colour]
        centres = np.array([expected[index].centre for index in wanted])  # (wanted, 2)
        centroids = np.array([patch.centroid for patch in patches if patch.colour == colour]).reshape(-1, 2)
        lengths = np.linalg.norm(centres[:, None] - centroids, axis=-1)  # (wanted, centroids)
        for row, column in zip(*linear_sum_assignment(lengths), strict=True):
            places[wanted[row]] = (float(centroids[column, 0]), float(centroids[column, 1]))
    return places


def centroid_error(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float:
    """Mean distance in pixels between where objects should be and where patches of their colours are.

    Objects and patches of a colour are paired for the least total distance (Kuhn, "The Hungarian method",
    1955). A lost object counts as the image's diagonal, the largest distance there is: losing an object
    never improves the score, and means and intervals stay finite; `objects_lost` tells such cases apart.
    The image must have the size of the scene that the objects are from.
    """
    _check_any(expected_objects)
    diagonal = float(np.hypot(*pixels_of(image).shape[:2]))
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
    _check_any(expected_objects)
    first, second = map(colour_areas, same_size(image, target))
    areas = [(first[name], second[name]) for name in sorted({item.colour for item in expected_objects})]
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in areas]))


def iou_by_object(
    image: ImageOrArray, target: ImageOrArray, expected_objects: Sequence[SceneObject]
) -> float:
    """Mean over the target's objects of each one's own intersection over union with the patch assigned to it.

    Patches of a colour are paired for the greatest total (Kuhn 1955); a lost object counts as 0, and so does
    one that stands wholly elsewhere, so this asks for each object what `object_iou` asks for a colour.
    """
    from scipy.ndimage import binary_fill_holes
    from scipy.optimize import linear_sum_assignment

    _check_any(expected_objects)
    both = [colour_areas(shown) for shown in same_size(target, image)]
    least = 0.1 * np.pi * min(item.radius for item in expected_objects) ** 2
    overlaps: list[float] = []
    for colour in sorted({item.colour for item in expected_objects}):
        # A letter that a shape encloses belongs to the shape.
        parts = [[binary_fill_holes(part) for part in _patches(areas[colour])] for areas in both]
        truth, patches = ([part for part in some if part.sum() >= least] for some in parts)
        table = np.array([[(a & b).sum() / (a | b).sum() for b in patches] for a in truth])
        own = np.zeros(len(truth))
        if len(patches):
            rows, columns = linear_sum_assignment(table, maximize=True)
            own[rows] = table[rows, columns]
        overlaps += own.tolist()
    return float(np.mean(overlaps))


def relations_kept(image: ImageOrArray, expected_objects: Sequence[SceneObject]) -> float | None:
    """Share of the relations left of / above between expected objects that the found ones satisfy.

    Pairs less than an eighth of the side apart along an axis have no relation there; a pair with a lost
    object satisfies none. None where there is no relation to satisfy. After SpatialSense and VISOR (Gokhale
    et al. 2022), which ask the same of detected objects.
    """
    size = pixels_of(image).shape[1]
    places = found_places(image, expected_objects)
    pairs = itertools.combinations(zip(expected_objects, places, strict=True), 2)
    kept = []
    for ((item, place), (other, beside)), axis in itertools.product(pairs, (0, 1)):
        wanted = other.centre[axis] - item.centre[axis]
        if abs(wanted) >= size / 8:
            kept.append(
                place is not None and beside is not None and (beside[axis] - place[axis]) * wanted > 0
            )
    return float(np.mean(kept)) if kept else None


def box_iou(image: ImageOrArray, boxes: Sequence[tuple[str, Box]]) -> float:
    """Mean IoU of each expected box (colour and place) with its colour's best patch."""
    from scipy.ndimage import find_objects as boxes_of
    from scipy.ndimage import label

    areas = colour_areas(image)
    best = []
    for colour, box in boxes:
        patches = boxes_of(label(areas[colour])[0])
        places = ((across.start, down.start, across.stop, down.stop) for down, across in patches)
        best.append(max((box_overlap(box, place) for place in places), default=0.0))
    return float(np.mean(best))


def _check_any(expected_objects: Sequence[SceneObject]) -> None:
    if not expected_objects:
        raise ValueError("expected_objects is empty; needed: at least one object to look for")
