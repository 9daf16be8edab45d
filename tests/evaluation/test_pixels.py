"""Claims about the metrics: hand-computed values, bounds, and what each of them reacts to."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from qwen_vision_bridge.evaluation.metrics import objects, ocr, text
from qwen_vision_bridge.evaluation.metrics import pixels as metrics
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import scene as scenes

WORDS = st.text(alphabet="ABCab ß3Éé", max_size=12)


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    return np.asarray(scenes.render(scenes.Scene(96, "waves", "mint", 3)))


@pytest.fixture(scope="module")
def left_half() -> np.ndarray:
    mask = np.zeros((96, 96), dtype=bool)
    mask[:, :48] = True
    return mask


def noisy(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 25, pixels.shape) * mask[..., None]
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


# --- text -----------------------------------------------------------------------------------------------


def test_edit_similarity_matches_hand_computed_values() -> None:
    assert text.edit_similarity("", "") == 1.0
    assert text.edit_similarity("", "CAFE") == 0.0
    assert text.edit_similarity("CAFE", "CAFE") == 1.0
    assert text.edit_similarity("CAFE", "CUFE") == 0.75  # one replaced of four
    assert text.edit_similarity("STONE", "TONE") == 0.8  # one deleted of five
    assert text.edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)  # Levenshtein distance 3 of 7
    assert text.edit_similarity("AB", "BA") == 0.0  # a transposition is two replacements
    assert text.edit_similarity("open", " O P E N ") == 1.0  # case and spaces do not count


@given(WORDS, WORDS)
@settings(max_examples=200, deadline=None)
def test_edit_similarity_is_symmetric_and_bounded(a: str, b: str) -> None:
    similarity = text.edit_similarity(a, b)
    assert similarity == text.edit_similarity(b, a)
    assert 0.0 <= similarity <= 1.0
    assert (similarity == 1.0) == (text.exact_text(a, b) == 1.0)


def test_exact_text_folds_case_spaces_and_width_only() -> None:
    assert text.exact_text("Ｏpen  ", "OPEN") == 1.0
    assert text.exact_text("OP EN", "OPEN") == 1.0
    assert text.exact_text("0PEN", "OPEN") == 0.0
    assert text.exact_text("", "") == 1.0


def test_boxes_are_read_line_by_line_from_left_to_right() -> None:
    from matplotlib import get_data_path

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 40)
    image = Image.new("RGB", (520, 240), "white")
    pencil = ImageDraw.Draw(image)
    for word, corner in (
        ("RIVER", (20, 30)),
        ("STONE", (330, 38)),
        ("MUSIC", (40, 150)),
        ("LEMON", (320, 144)),
    ):
        pencil.text(corner, word, "black", font)
    assert ocr.read_text(image) == "RIVER STONE MUSIC LEMON"


@pytest.mark.slow
def test_an_image_without_words_reads_empty_though_it_has_shapes() -> None:
    images = [case.image for case in world.make_cases("space", 6, seed=2)]
    assert [ocr.read_text(image) for image in images] == [""] * 6


# --- space ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_find_objects_recovers_every_centre_within_two_pixels() -> None:
    for case in (case for group in world.GROUPS for case in world.make_cases(group, 24, seed=1)):
        found = objects.find_objects(case.target)
        assert len(found) == len(case.expected_objects), case.case_id
        if (
            case.expected_objects and case.kind != "marked"
        ):  # a letter takes its part out of the shape beneath
            assert objects.centroid_error(case.target, case.expected_objects) < 2, case.case_id


def test_find_objects_survives_blur_and_noise() -> None:
    for case in world.make_cases("space", 12, seed=9):
        blurred = np.asarray(case.target.filter(ImageFilter.GaussianBlur(1)))
        noise = np.random.default_rng(0).normal(0, 6, blurred.shape)
        image = (blurred + noise).round().clip(0, 255).astype(np.uint8)
        assert objects.objects_lost(image, case.expected_objects) == 0, case.case_id
        assert objects.centroid_error(image, case.expected_objects) < 2, case.case_id


def test_centroid_error_is_the_distance_of_the_move() -> None:
    item = scenes.SceneObject("circle", "red", (40.0, 50.0), 14.0)
    image = scenes.render(scenes.Scene(128, "checks", "beige", 1, (item,)))
    assert objects.centroid_error(image, [item]) < 0.5
    moved = replace(item, centre=(70.0, 90.0))
    assert objects.centroid_error(image, [moved]) == pytest.approx(50, abs=0.5)  # a 3-4-5 triangle


def test_a_lost_object_counts_as_the_diagonal() -> None:
    kept = scenes.SceneObject("circle", "red", (40.0, 50.0), 14.0)
    lost = scenes.SceneObject("star", "blue", (90.0, 80.0), 14.0)
    image = scenes.render(scenes.Scene(128, "dots", "rose", 1, (kept,)))
    diagonal = 128 * math.sqrt(2)
    assert objects.objects_lost(image, [kept]) == 0
    assert objects.objects_lost(image, [kept, lost]) == 1
    assert objects.centroid_error(image, [lost]) == pytest.approx(diagonal)
    assert objects.centroid_error(image, [kept, lost]) == pytest.approx(diagonal / 2, abs=0.5)


def test_objects_of_a_colour_pair_for_the_least_distance() -> None:
    pair = [scenes.SceneObject("square", "green", (x, 64.0), 14.0) for x in (30.0, 95.0)]
    image = scenes.render(scenes.Scene(128, "stripes", "brown", 1, tuple(pair)))
    assert objects.centroid_error(image, pair) < 0.5
    assert objects.centroid_error(image, pair[::-1]) < 0.5
    assert objects.objects_lost(image, [*pair, replace(pair[0], centre=(60.0, 20.0))]) == 1


# --- detail ---------------------------------------------------------------------------------------------


def test_masked_ssim_is_one_for_identical_images(texture: np.ndarray, left_half: np.ndarray) -> None:
    assert metrics.masked_ssim(texture, Image.fromarray(texture), left_half) == pytest.approx(1.0)


def test_masked_ssim_falls_only_where_the_mask_changes(texture: np.ndarray, left_half: np.ndarray) -> None:
    changed = noisy(texture, left_half)
    assert metrics.masked_ssim(texture, changed, left_half) < 0.8
    far_from_it = np.zeros_like(left_half)
    far_from_it[:, 48 + 5 :] = True  # half a window further on
    assert metrics.masked_ssim(texture, changed, far_from_it) == pytest.approx(1.0)


def test_a_mask_loses_its_rim_unless_it_would_vanish(left_half: np.ndarray) -> None:
    assert np.array_equal(metrics.shrink(left_half, 5)[:, :43], left_half[:, :43])
    assert not metrics.shrink(left_half, 5)[:, 43:].any()
    thin = np.zeros((20, 20), bool)
    thin[3] = True
    assert np.array_equal(metrics.shrink(thin), thin)


def test_masked_psnr_matches_a_hand_computed_value(texture: np.ndarray, left_half: np.ndarray) -> None:
    shifted = texture.copy()
    shifted[left_half] += 10
    assert texture.max() <= 245
    assert metrics.masked_psnr(texture, shifted, left_half) == pytest.approx(20 * math.log10(255 / 10))
    assert metrics.masked_psnr(texture, shifted, ~left_half) == math.inf


def test_mean_abs_difference_counts_grey_levels(texture: np.ndarray, left_half: np.ndarray) -> None:
    shifted = texture.copy()
    shifted[left_half] -= 10
    assert metrics.mean_abs_difference(texture, shifted) == pytest.approx(5)
    assert metrics.mean_abs_difference(texture, shifted, left_half) == pytest.approx(10)
    assert metrics.mean_abs_difference(texture, shifted, ~left_half) == 0


def test_colour_error_matches_known_values() -> None:
    mask = np.ones((4, 4), dtype=bool)
    red = np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8)
    assert metrics.colour_error(red, mask, (255, 0, 0)) == pytest.approx(0, abs=1e-6)
    assert metrics.colour_error(red, mask, (0, 0, 255)) == pytest.approx(52.88, abs=0.05)  # sRGB red and blue
    half = red.copy()
    half[:2] = (0, 0, 255)
    assert metrics.colour_error(half, mask, (255, 0, 0)) == pytest.approx(52.88 / 2, abs=0.05)


def test_a_right_edit_scores_better_than_none_in_every_kind() -> None:
    """Inside the mask, which is where an edit that did nothing and one that hit the target differ."""
    for case in (case for group in world.GROUPS for case in world.make_cases(group, 20, seed=4)):
        assert metrics.masked_ssim(case.target, case.target, case.edit_mask) == pytest.approx(1)
        assert metrics.masked_ssim(case.image, case.target, case.edit_mask) < 0.99, case.case_id
        assert metrics.mean_abs_difference(case.image, case.target, case.edit_mask) > 1, case.case_id


# --- the boundary ---------------------------------------------------------------------------------------


def test_images_of_different_sizes_are_refused_with_both_sizes(texture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="96 × 96 px and 80 × 96 px"):
        metrics.mean_abs_difference(texture, texture[:, :80])


def test_a_mask_that_does_not_fit_is_refused(texture: np.ndarray, left_half: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(96, 48\).*needed: bool \(96, 96\)"):
        metrics.masked_psnr(texture, texture, left_half[:, :48])
    with pytest.raises(ValueError, match="uint8"):
        metrics.masked_ssim(texture, texture, left_half.astype(np.uint8))
    with pytest.raises(ValueError, match="at least one pixel"):
        metrics.colour_error(texture, np.zeros_like(left_half), (0, 0, 0))


def test_an_image_that_is_none_is_refused(texture: np.ndarray, left_half: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float32"):
        ocr.read_text(texture.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(96, 96\)"):
        objects.find_objects(texture[..., 0])
    with pytest.raises(TypeError, match="str"):
        metrics.colour_error("image.png", left_half, (0, 0, 0))
    with pytest.raises(ValueError, match="at least one object"):
        objects.centroid_error(texture, [])
    with pytest.raises(ValueError, match="11 × 11"):
        metrics.masked_ssim(texture[:8], texture[:8], left_half[:8])


def test_importing_the_metrics_loads_no_heavy_library() -> None:
    lines = (
        "import sys; import qwen_vision_bridge.evaluation.metrics.pixels",
        "assert not {'torch', 'skimage', 'scipy', 'rapidocr', 'cv2', 'onnxruntime'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)
