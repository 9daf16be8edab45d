"""Panels of the figures, measured by their colours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge import plots
from qwen_vision_bridge.plots import Known, attention_figure, comparison_sheet, drawable, preference

LEVELS = ("early", "mid", "late")
WHITE = Image.new("RGB", (96, 64), "white")


def sheet(enhanced: Image.Image, *inputs: Image.Image, known: Known | None = None) -> np.ndarray:
    white = Image.new("RGB", (96, 64), "white")
    figure = comparison_sheet(inputs or [white], white, enhanced, "a prompt", 3, 0.5, "caption", known)
    return np.asarray(figure)


def below(drawn: np.ndarray, column: int, columns: int) -> np.ndarray:
    """The middle of a panel of the lower row."""
    height, width = drawn.shape[:2]
    left = width * column // columns
    return drawn[
        height * 7 // 10 : height * 8 // 10, left + width // (3 * columns) : left + width // (2 * columns)
    ]


def test_the_differences_are_below_what_they_are_of() -> None:
    """Of the two edits, and what each changed of the white input."""
    equal = sheet(Image.new("RGB", (96, 64), "white"))
    other = sheet(Image.new("RGB", (96, 64), (235, 235, 235)))
    assert [below(equal, column, 3).max() for column in range(3)] == [0, 0, 0]
    found = [int(np.median(below(other, column, 3))) for column in range(3)]
    assert found[1] == 0  # the baseline changed nothing
    assert abs(found[0] - 100) <= 1  # 20 of 255, five times
    assert abs(found[2] - 100) <= 1


@pytest.mark.slow
def test_a_known_target_and_references_widen_the_sheet() -> None:
    white, wide = Image.new("RGB", (96, 64), "white"), sheet(Image.new("RGB", (96, 64))).shape[1]
    known = sheet(white, white, known=(white, False, True)).shape[1]
    assert known == pytest.approx(wide * 4 / 3, rel=0.03)
    portrait = sheet(white, Image.new("RGB", (40, 100)), white)
    assert portrait.shape[1] < wide * 1.15  # a narrow reference takes a narrow panel
    assert portrait.shape[0] == sheet(white).shape[0]  # and makes no other smaller


def test_the_figure_says_whether_a_level_is_preferred() -> None:
    assert preference(np.full((4, 4, 3), 1 / 3), LEVELS) == (
        "the attention weights are nearly equal: the bridge prefers no level"
    )
    assert preference(np.full((4, 4, 3), (0.1, 0.7, 0.2)), LEVELS) == "the bridge attends most to mid"


def test_shares_of_the_update_are_drawn_where_they_are_known() -> None:
    image, equal = Image.new("RGB", (96, 64), "grey"), np.full((4, 6, 3), 1 / 3)
    shares = np.zeros((4, 6, 3))
    shares[..., 1] = 1.0
    plain, shared = (np.asarray(attention_figure(image, equal, LEVELS, shares=s)) for s in (None, shares))
    assert not np.array_equal(plain, shared)
    width = shared.shape[1] // 4
    mid, late = shared[:, 2 * width : 3 * width].astype(int), shared[:, 3 * width :].astype(int)
    assert ((mid[..., 0] - mid[..., 2]) > 60).mean() > 2 * ((late[..., 0] - late[..., 2]) > 60).mean()


def test_letters_that_no_font_has_are_named_not_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "fonts", lambda: ["DejaVu Sans"])
    plots._loaded_fonts.cache_clear()
    assert drawable('Schreibe "Größe", Θάλασσα $x$') == 'Schreibe "Größe", Θάλασσα $x$'
    assert drawable('to "图书馆".') == 'to "[3 letters, drawn with fonts-noto-cjk]".'
    assert drawable("नम") == "[2 letters, drawn with fonts-noto-core]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every box that it draws
        comparison_sheet([WHITE], WHITE, WHITE, "把文字改成“图书馆”", 0, 1.0, "caption")
        attention_figure(WHITE, np.full((4, 4, 3), 1 / 3), LEVELS, "नमस्ते $x")
    plots._loaded_fonts.cache_clear()


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
    with pytest.raises(ValueError, match="3 levels"):
        attention_figure(Image.new("RGB", (32, 32)), np.ones((2, 2, 4)), LEVELS)
