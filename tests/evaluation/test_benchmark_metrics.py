"""Public benchmarks' own metrics, by values worked out by hand and by the libraries their authors use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vision_bridge.case import Case
from qwen_vision_bridge.evaluation.metrics.benchmarks import RegionScores, Word, masked_scores, region_scores
from qwen_vision_bridge.evaluation.scoring import measure, unmeasured
from qwen_vision_bridge.synthetic.multilingual import language_cases


def line(text: str, top: float, left: float = 0) -> Word:
    return Word(text, (left, top, left + 100, top + 20))


def test_right_text_scores_1_and_untouched_text_less() -> None:
    before = [line("OPEN", 0), line("DAILY", 100)]
    assert region_scores(before, [line("SHUT", 0), line("DAILY", 100)], "OPEN", "SHUT") == (1, 1, 1, 1, 1)
    # Nothing of OPEN is in SHUT, so the accuracy is 0; the other line stays: 0.5 of 1.
    same = region_scores(before, before, "OPEN", "SHUT")
    assert same == (0, 0.5, 0.5, 0.5, 0)
    # OVEN shares three of four letters with OPEN, but the source stayed: 0.75 × 0.2; (0.15 × 0.5 + 0.5) / 1.
    near = region_scores(before, before, "OPEN", "OVEN")
    assert near.target_accuracy == pytest.approx(0.15)
    assert near.recall == pytest.approx(0.575)
    assert near.roi_ned == pytest.approx(0.75)  # source and target are too alike for its own punishment


def test_lines_that_had_to_stay_and_lines_that_were_added_count() -> None:
    before = [line("OPEN", 0), line("DAILY", 100)]
    lost = region_scores(before, [line("SHUT", 0)], "OPEN", "SHUT")
    assert (lost.precision, lost.recall, lost.f1) == pytest.approx((1, 0.5, 2 / 3))
    added = region_scores(before, [line("SHUT", 0), line("DAILY", 100), line("XQZ", 200)], "OPEN", "SHUT")
    assert (added.precision, added.recall) == pytest.approx((1 / 1.5, 1))
    elsewhere = region_scores(before, [line("SHUT", 200), line("DAILY", 100)], "OPEN", "SHUT")
    assert elsewhere.target_accuracy == elsewhere.roi_ned == 0  # only where the old text was


def test_two_boxes_are_a_line_and_unreadable_images_score_0() -> None:
    before = [Word("BIG SALE", (0, 0, 200, 20))]
    halves = [Word("DAY", (110, 2, 200, 20)), Word("LAST", (0, 0, 90, 20))]
    assert region_scores(before, halves, "BIG SALE", "LAST DAY").target_accuracy == 1
    nothing = RegionScores(0, 0, 0, 0, 0)
    assert region_scores([], halves, "A", "B") == nothing
    assert region_scores([line("QQQQ", 0)], halves, "OPEN", "B") == nothing
    assert region_scores(before, [], "BIG SALE", "B") == nothing


def test_pie_bench_metrics_are_those_of_torchmetrics(photo: Image.Image) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    other = photo.rotate(2)
    mask = np.zeros((photo.height, photo.width), bool)
    mask[30:90, 50:120] = True
    found = masked_scores(other, photo, mask)
    planes = [
        torch.from_numpy(np.where(mask[..., None], 0, np.asarray(shown)) / np.float32(255)).permute(2, 0, 1)[
            None
        ]
        for shown in (other, photo)
    ]
    assert found["pie_psnr_db"] == pytest.approx(
        float(peak_signal_noise_ratio(*planes, data_range=1.0)), abs=1e-3
    )
    expected = float(structural_similarity_index_measure(*planes, data_range=1.0))
    assert found["pie_ssim"] == pytest.approx(expected, abs=1e-4)
    assert found["pie_mse"] == pytest.approx(float(((planes[0] - planes[1]) ** 2).mean()), rel=1e-4)
    assert masked_scores(photo, photo, mask) == {"pie_psnr_db": 100, "pie_mse": 0, "pie_ssim": 1}
    assert masked_scores(photo, photo, np.ones_like(mask)) is None
    with pytest.raises(ValueError, match="needed: one size"):
        masked_scores(photo, photo, mask[:-1])


def test_file_cases_get_the_metrics_of_their_benchmark() -> None:
    (made,) = language_cases(1)[0]
    case = Case(
        "t",
        "ocr",
        "own",
        made.prompt,
        made.image,
        made.target,
        source_text=made.source_text,
        expected_text=made.expected_text,
        text_is_part=True,
        dataset="textedit",
    )
    right, untouched = measure(case, case.target), measure(case, case.image)
    assert right["region_target_accuracy"] == right["region_f1"] == right["region_roi_ned"] == 1
    assert untouched["region_f1"] < 0.5
    pie = Case("p", "detail", "type1", "x", made.image, edit_mask=made.edit_mask, dataset="pie")
    scores = measure(pie, pie.image)
    assert (scores["pie_ssim"], scores["pie_mse"]) == (1, 0)
    lines = " ".join(unmeasured([case, pie]))
    assert "CLIP" in lines
    assert "DINO" in lines
