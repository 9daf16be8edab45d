"""Panels of the figures, measured by their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.plots import attention_figure, comparison_sheet

LEVELS = ("early", "mid", "late")


def sheet(enhanced: Image.Image, count: int = 1) -> np.ndarray:
    inputs = [Image.new("RGB", (96, 64), "white")] * count
    figure = comparison_sheet(
        inputs, Image.new("RGB", (96, 64), "white"), enhanced, "a prompt", 3, 0.5, "caption"
    )
    return np.asarray(figure)


def test_only_equal_edits_have_a_black_difference_panel() -> None:
    equal = sheet(Image.new("RGB", (96, 64), "white"))
    other = sheet(Image.new("RGB", (96, 64), (235, 235, 235)))
    right = slice(equal.shape[1] * 4 // 5, equal.shape[1] * 9 // 10)
    middle = slice(equal.shape[0] * 2 // 5, equal.shape[0] * 3 // 5)
    assert equal[middle, right].max() == 0
    assert np.abs(other[middle, right].astype(int) - 100).max() <= 1  # 20 of 255, five times


def test_several_inputs_widen_the_sheet() -> None:
    one, three = (sheet(Image.new("RGB", (96, 64)), count).shape[1] for count in (1, 3))
    assert three == pytest.approx(one * 6 / 4, rel=0.02)


def test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(96, 64\).*\(64, 64\)"):
        sheet(Image.new("RGB", (64, 64)))


def test_the_attention_map_colours_the_right_places() -> None:
    weights = np.zeros((4, 6, 3))
    weights[..., 0] = 1.0
    weights[:2, :3] = (0.0, 0.0, 1.0)  # the top left corner draws on `late`
    image = Image.new("RGB", (96, 64), "grey")
    drawn = np.asarray(attention_figure(image, weights, LEVELS)).astype(int)
    early, late = drawn[:, drawn.shape[1] // 4 : drawn.shape[1] // 2], drawn[:, drawn.shape[1] * 2 // 3 :]
    yellow = [(panel[..., 0] - panel[..., 2] > 60).mean() for panel in (early, late)]
    assert yellow[0] > 2 * yellow[1] > 0


def test_weights_of_other_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit the 3 levels"):
        attention_figure(Image.new("RGB", (32, 32)), np.ones((2, 2, 4)), LEVELS)
