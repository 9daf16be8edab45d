"""The language model reads precomputed features exactly as it reads its own tower's, template and all."""

from __future__ import annotations

from math import isqrt
from typing import Any

import pytest
import torch

from qwen_vision_bridge.evaluation.arms import Arm
from qwen_vision_bridge.evaluation.vqa import Question, ask
from qwen_vision_bridge.extractor import VisionCacheExtractor
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.patches import mrope_positions
from qwen_vision_bridge.synthetic.cases import make_cases
from qwen_vision_bridge.training.data import Sample
from qwen_vision_bridge.training.features import FeatureEncoder, pooled
from qwen_vision_bridge.training.frozen_lm import FrozenLanguageModel

FAMILY = FAMILIES["miniature"]
CASES = make_cases("ocr", 3, seed=4, split="validation")
GRID = (8, 8)
SHOWN = isqrt(FAMILY.editor.condition_area)  # px a side, to which the pipeline reduces images for the target


@pytest.fixture(scope="module")
def encoded() -> list[dict[str, Any]]:
    """Features of the cases from both towers, with those at a higher resolution."""
    encoder = FeatureEncoder(FAMILY, "cpu", torch.float32, highres_target=True)
    fields = encoder.encode([Sample(case.image, case.prompt) for case in CASES])
    encoder.close()
    return fields


@pytest.fixture(scope="module")
def language_model(shared_pipe: Any) -> FrozenLanguageModel:
    processor = load_processor(FAMILY.target.repo, FAMILY.target.processor_subfolder, None, False)
    return FrozenLanguageModel(shared_pipe.text_encoder, processor, FAMILY)


@pytest.fixture
def features(encoded: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([fields["vision"] for fields in encoded])


def test_hidden_states_are_those_of_the_edit_pipeline(
    pipe: Any, language_model: FrozenLanguageModel, features: torch.Tensor
) -> None:
    texts = language_model.tokenize([(case.prompt, None) for case in CASES], edit=True)
    states = language_model.hidden_states(
        features, texts.ids, GRID, edit=True, first=pipe.prompt_template_encode_start_idx
    )
    for case, mine, length in zip(CASES, states, texts.prompt_lengths, strict=True):
        small = pipe.image_processor.resize(case.image, SHOWN, SHOWN)
        with torch.no_grad(), mrope_positions(pipe):
            stock, _ = pipe.encode_prompt(image=[small], prompt=case.prompt)
        used = len(mine) - texts.ids.shape[1] + int(length)
        assert stock.shape[1] == used
        torch.testing.assert_close(mine[:used], stock[0], atol=2e-4, rtol=1e-3)


def test_generated_answers_are_the_stock_pipelines(
    editor: Any, language_model: FrozenLanguageModel, features: torch.Tensor
) -> None:
    question = Question("read", "What does it say?", "")
    stock = [ask(editor, case.image, question, Arm("baseline"), None) for case in CASES]
    assert language_model.generate(features, [question.text] * len(CASES), GRID, 32) == stock


def test_a_cached_prefix_changes_no_loss_and_no_gradient(
    shared_pipe: Any, language_model: FrozenLanguageModel, features: torch.Tensor
) -> None:
    texts = language_model.tokenize(
        [("What does it say?", case.source_text.replace(" ", "/")) for case in CASES]
    )

    def gradient(one: FrozenLanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
        asked = features.clone().requires_grad_()
        wrong, _, total = one.cross_entropy(asked, texts, GRID)
        return wrong / total, torch.autograd.grad(wrong / total, asked)[0]

    shared = gradient(language_model)
    try:
        plain = gradient(
            FrozenLanguageModel(
                shared_pipe.text_encoder, language_model.processor, FAMILY, checkpointing=True
            )
        )
    finally:
        shared_pipe.text_encoder.gradient_checkpointing_disable()
        shared_pipe.text_encoder.eval()
    for mine, other in zip(shared, plain, strict=True):
        assert mine.norm() > 1e-3
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    assert all(parameter.grad is None for parameter in shared_pipe.text_encoder.parameters())


def test_labels_are_the_answer_and_nothing_else(language_model: FrozenLanguageModel) -> None:
    texts = language_model.tokenize([("What does it say?", "HELLO"), ("Where is it?", None)])
    ids, labels = texts.ids[0].tolist(), texts.labels[0].tolist()
    answer = [label for label in labels[int(texts.prompt_lengths[0]) - 1 :] if label >= 0]
    assert language_model.processor.tokenizer.decode(answer) == "HELLO<|im_end|>"
    for position in range(int(texts.prompt_lengths[0]), len(answer)):
        assert labels[position] == ids[position + 1]  # the token that follows
    assert (texts.labels[1] == -1).all()
    assert (texts.weights[1] == 0).all()
    with pytest.raises(ValueError, match="at most 512"):
        language_model.tokenize([("A" * 600, "B")])


def test_features_are_those_inside_the_pipeline(
    pipe: Any, editor: Any, encoded: list[dict[str, Any]]
) -> None:
    from qwen_vision_bridge.injection import capture_vision

    for case, fields in zip(CASES, encoded, strict=True):
        with torch.no_grad(), capture_vision(pipe) as record:
            pipe.encode_prompt(image=[pipe.image_processor.resize(case.image, SHOWN, SHOWN)], prompt="x")
        torch.testing.assert_close(fields["vision"], record.baselines[0], atol=1e-5, rtol=1e-4)
        source = editor.extract_source([case.image])
        torch.testing.assert_close(fields["late"], source.late_features[0], atol=1e-4, rtol=1e-3)
        assert fields["grid"] == [8, 8]


def test_highres_features_are_of_the_processors_largest_size(encoded: list[dict[str, Any]]) -> None:
    sharp = VisionCacheExtractor(FAMILY, dtype=torch.float32, feature_cache=False)
    for case, fields in zip(CASES, encoded, strict=True):
        features = sharp.extract_qwen25_vision(case.image).vision_features[0]
        off, far = (features - fields["highres"]).norm(), (features - fields["vision"]).norm()
        assert off < 0.1 * far  # not 0: resized to the grid by another road


def test_highres_features_of_another_grid_are_pooled() -> None:
    fine = torch.arange(16.0).view(16, 1)  # 4 × 4 tokens, row by row
    assert pooled(fine, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    encoder = FeatureEncoder(FAMILY, "cpu", torch.float32, highres_target=True)
    image = CASES[0].image.resize((120, 50))
    (fields,) = encoder.encode([Sample(image, CASES[0].prompt)])
    assert encoder.extractor.target_grid(image) != tuple(fields["grid"])  # the reduced one is less wide
    encoder.close()
    highres, plain = fields["highres"], fields["vision"]
    assert highres.shape == plain.shape
    moved = torch.nn.functional.cosine_similarity(highres, plain.roll(8, 0), dim=-1).mean()
    assert torch.nn.functional.cosine_similarity(highres, plain, dim=-1).mean() > moved  # places agree
