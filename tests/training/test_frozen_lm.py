"""The language model reads features given by hand exactly as it reads its own tower's, template and all."""

from __future__ import annotations

from math import isqrt
from typing import Any

import pytest
import torch

from qwen_vision_bridge.evaluation.arms import Arm
from qwen_vision_bridge.evaluation.vqa import Question, ask
from qwen_vision_bridge.extractor import VisionCacheExtractor
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.patches import mrope_positions
from qwen_vision_bridge.specs import FAMILIES
from qwen_vision_bridge.synthetic.cases import make_cases
from qwen_vision_bridge.training.data import Sample
from qwen_vision_bridge.training.features import FeatureEncoder, pooled
from qwen_vision_bridge.training.frozen_lm import Reader

FAMILY = FAMILIES["miniature"]
CASES = make_cases("ocr", 3, seed=4, split="validation")
GRID = (8, 8)
SHOWN = isqrt(FAMILY.editor.condition_area)  # px a side, to which the pipeline reduces images for the target


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """What both towers see of the cases, with a teacher."""
    encoder = FeatureEncoder(FAMILY, "cpu", torch.float32, teacher=True)
    found = encoder.see([Sample(case.image, case.prompt) for case in CASES])
    encoder.close()
    return found


@pytest.fixture(scope="module")
def reader(shared_pipe: Any) -> Reader:
    processor = load_processor(FAMILY.target.repo, FAMILY.target.processor_subfolder, None, False)
    return Reader(shared_pipe.text_encoder, processor, FAMILY)


@pytest.fixture
def features(seen: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([found["vision"] for found in seen])


def test_what_is_read_of_given_features_is_what_the_edit_pipeline_reads(
    pipe: Any, reader: Reader, features: torch.Tensor
) -> None:
    rows = reader.rows([(case.prompt, None) for case in CASES], edit=True)
    states = reader.states(features, rows.ids, GRID, edit=True, cut=pipe.prompt_template_encode_start_idx)
    for case, mine, length in zip(CASES, states, rows.lengths, strict=True):
        small = pipe.image_processor.resize(case.image, SHOWN, SHOWN)
        with torch.no_grad(), mrope_positions(pipe):
            stock, _ = pipe.encode_prompt(image=[small], prompt=case.prompt)
        used = len(mine) - rows.ids.shape[1] + int(length)
        assert stock.shape[1] == used
        torch.testing.assert_close(mine[:used], stock[0], atol=2e-4, rtol=1e-3)


def test_replies_are_those_of_asking_the_stock_pipeline(
    editor: Any, reader: Reader, features: torch.Tensor
) -> None:
    question = Question("read", "What does it say?", "")
    stock = [ask(editor, case.image, question, Arm("baseline"), None) for case in CASES]
    assert reader.reply(features, [question.text] * len(CASES), GRID, 32) == stock


def test_the_template_worked_out_once_changes_nothing_and_neither_does_checkpointing(
    shared_pipe: Any, reader: Reader, features: torch.Tensor
) -> None:
    rows = reader.rows([("What does it say?", case.source_text.replace(" ", "/")) for case in CASES])

    def gradient(one: Reader) -> tuple[torch.Tensor, torch.Tensor]:
        asked = features.clone().requires_grad_()
        wrong, _, total = one.cross_entropy(asked, rows, GRID)
        return wrong / total, torch.autograd.grad(wrong / total, asked)[0]

    shared = gradient(reader)
    try:
        plain = gradient(Reader(shared_pipe.text_encoder, reader.processor, FAMILY, checkpointing=True))
    finally:
        shared_pipe.text_encoder.gradient_checkpointing_disable()
        shared_pipe.text_encoder.eval()
    for mine, other in zip(shared, plain, strict=True):
        assert mine.norm() > 1e-3
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    assert all(parameter.grad is None for parameter in shared_pipe.text_encoder.parameters())


def test_rows_teach_the_reply_and_nothing_else(reader: Reader) -> None:
    rows = reader.rows([("What does it say?", "HELLO"), ("Where is it?", None)])
    ids, labels = rows.ids[0].tolist(), rows.labels[0].tolist()
    said = [label for label in labels[int(rows.lengths[0]) - 1 :] if label >= 0]
    assert reader.processor.tokenizer.decode(said) == "HELLO<|im_end|>"
    for place in range(int(rows.lengths[0]), len(said)):
        assert labels[place] == ids[place + 1]  # the token that follows
    assert (rows.labels[1] == -1).all()
    assert (rows.weights[1] == 0).all()
    with pytest.raises(ValueError, match="room for"):
        reader.rows([("A" * 600, "B")])


def test_the_eyes_see_what_the_pipeline_sees(pipe: Any, editor: Any, seen: list[dict[str, Any]]) -> None:
    from qwen_vision_bridge.injection import capture_vision

    for case, found in zip(CASES, seen, strict=True):
        with torch.no_grad(), capture_vision(pipe) as record:
            pipe.encode_prompt(image=[pipe.image_processor.resize(case.image, SHOWN, SHOWN)], prompt="x")
        torch.testing.assert_close(found["vision"], record.baselines[0], atol=1e-5, rtol=1e-4)
        source = editor.extract_source([case.image])
        torch.testing.assert_close(found["late"], source.late_features[0], atol=1e-4, rtol=1e-3)
        assert found["grid"] == [8, 8]


def test_a_teacher_sees_the_image_as_large_as_the_processor_takes_it(seen: list[dict[str, Any]]) -> None:
    sharp = VisionCacheExtractor(FAMILY, dtype=torch.float32, feature_cache=False)
    for case, found in zip(CASES, seen, strict=True):
        features = sharp.extract_qwen25_vision(case.image).vision_features[0]
        off, far = (features - found["teacher"]).norm(), (features - found["vision"]).norm()
        assert off < 0.1 * far  # not 0: resized to the grid by another road


def test_a_teacher_of_another_grid_is_averaged_place_by_place() -> None:
    fine = torch.arange(16.0).view(16, 1)  # 4 × 4 tokens, row by row
    assert pooled(fine, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    encoder = FeatureEncoder(FAMILY, "cpu", torch.float32, teacher=True)
    image = CASES[0].image.resize((120, 50))
    (found,) = encoder.see([Sample(image, CASES[0].prompt)])
    assert encoder.extractor.target_grid(image) != tuple(found["grid"])  # the reduced one is less wide
    encoder.close()
    teacher, plain = found["teacher"], found["vision"]
    assert teacher.shape == plain.shape
    moved = torch.nn.functional.cosine_similarity(teacher, plain.roll(8, 0), dim=-1).mean()
    assert torch.nn.functional.cosine_similarity(teacher, plain, dim=-1).mean() > moved  # places agree
