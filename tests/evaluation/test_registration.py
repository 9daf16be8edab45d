"""Registration finds planted shifts, scales and turns, though part of the image was edited."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from qwen_vision_bridge.evaluation.metrics.registration import measure_drift
from qwen_vision_bridge.synthetic.cases import make_cases


def moved(image: Image.Image, right: float, down: float, scale: float, degrees: float) -> Image.Image:
    """The image's content shifted, scaled and turned about its centre, with a red patch painted over it."""
    centre = (np.array(image.size) - 1) / 2
    turn = SimilarityTransform(scale=scale, rotation=np.radians(degrees))
    whole = SimilarityTransform(translation=-centre) + turn
    whole += SimilarityTransform(translation=centre + np.array([right, down]))
    pixels = warp(np.asarray(image), whole.inverse, mode="edge", order=3) * 255
    pixels = pixels.clip(0, 255).round().astype(np.uint8)
    pixels[20:50, 30:70] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("right", "down", "scale", "degrees"),
    [(0, 0, 1, 0), (2.5, -1.25, 1, 0), (0, 0, 1.02, 0), (0, 0, 1, 1.5), (3, 2, 0.97, -2), (12, -7, 1, 0)],
)
def test_a_planted_drift_is_recovered_beside_an_edit(
    right: float, down: float, scale: float, degrees: float, photo: Image.Image
) -> None:
    for image in (photo, make_cases("detail", 1, 0)[0].image):
        drift = measure_drift(moved(image, right, down, scale, degrees), image)
        assert drift is not None
        assert (drift.right_px, drift.down_px) == pytest.approx((right, down), abs=0.1)
        assert drift.scale == pytest.approx(scale, abs=0.001)
        assert drift.rotation_deg == pytest.approx(degrees, abs=0.05)
        assert drift.shift_px == pytest.approx(np.hypot(right, down), abs=0.1)


def test_large_images_are_measured_in_their_own_pixels(photo: Image.Image) -> None:
    large = photo.resize((720, 480))
    drift = measure_drift(moved(large, 6, 3, 1, 0), large)
    assert (drift.right_px, drift.down_px) == pytest.approx((6, 3), abs=0.3)


def test_nothing_to_register_gives_no_number(photo: Image.Image) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
    assert measure_drift(Image.new("RGB", photo.size, "red"), photo) is None
    assert measure_drift(Image.fromarray(noise), photo) is None
    with pytest.raises(ValueError, match=r"\(10, 10\).*\(240, 160\)"):
        measure_drift(Image.new("RGB", (10, 10)), photo)
