"""The recipes that train the miniature compute what the stock models compute, and every stage runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vision_bridge.case import Scene
from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
from qwen_vision_bridge.synthetic import cases as world
from qwen_vision_bridge.synthetic import questions
from recipes.miniature import build as miniature
from recipes.miniature import tokenizer as tokens
from tests.conftest import STOCK


@pytest.mark.parametrize("shown", [1, 2])
@pytest.mark.parametrize("role", ["source", "target"])
def test_a_batch_of_prompts_equals_prompts_one_by_one(role: str, shown: int) -> None:
    """By the stock processor and model, with what they compute themselves: positions, attention, padding."""
    from recipes.miniature import data
    from recipes.miniature.models import build_reader

    reader, rows = build_reader(role, seed=0), data.dialogues("test", 0, 2, shown)
    images = rows["full" if role == "source" else "small"]
    with torch.no_grad():
        batched = reader.hidden(torch.from_numpy(images), torch.from_numpy(rows["text"]))
        for row, text, seen in zip(batched, rows["text"], images, strict=True):
            words = reader.processor.tokenizer.decode(text[text > 0])
            slots = (f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(shown))
            prompt = tokens.TEMPLATE_PREFIX + "".join(slots) + words
            inputs = reader.processor(
                text=[prompt], images=list(map(Image.fromarray, seen)), return_tensors="pt"
            )
            stock = reader.model.model(**inputs).last_hidden_state[0]
            assert stock.shape[0] == len(data.opening(shown)[0]) + int((text > 0).sum())
            torch.testing.assert_close(row[: stock.shape[0]], stock, atol=1e-4, rtol=1e-4)


class _FirstStep(Exception):  # noqa: N818 - it ends an edit and is no error
    pass


@pytest.mark.parametrize("group", ["ocr", pytest.param("consistency", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_transformer_trains_on_what_the_pipeline_gives_it(
    group: str, is_dropped: bool, editor: Any, editor_folder: Path
) -> None:
    """A dropped prompt is the pipeline's empty negative one, which guidance reads after the other."""
    from recipes.miniature import data
    from recipes.miniature.train_dit import load

    case = world.make_cases(group, 1, seed=1, split="validation")[0]
    calls: list[dict[str, Any]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)
        if len(calls) == 1 + is_dropped:
            raise _FirstStep

    full_size = EnhancedQwenImageEdit(STOCK, bridge="fresh", pipe=editor.pipe, dtype=torch.float32)
    handle = editor.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with pytest.raises(_FirstStep):
            full_size.generate(case.images, case.prompt, use_qwen3_vision=False, seed=5, true_cfg_scale=4.0)
    finally:
        handle.remove()
    stock, sent = calls[-1], {}
    parts = (str(editor_folder / name) for name in ("text_encoder", "vae", "transformer"))
    batched = load(*parts, seed=0)
    batched.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: sent.update(kwargs), with_kwargs=True
    )
    full = torch.from_numpy(np.stack([np.asarray(image) for image in case.images]))[None]
    small = torch.from_numpy(np.stack([data.small(image) for image in case.images]))[None]
    text, length = (torch.from_numpy(np.asarray(part))[None] for part in data.prompt_row(case.prompt))
    with torch.no_grad():
        states, empty = batched.embed(small, text)
        conditions = batched.conditions(states, empty, length, torch.tensor([is_dropped]))
        noisy = stock["hidden_states"][:, :256]
        batched.velocity(noisy, batched.references(full), *conditions, stock["timestep"])
    count = stock["encoder_hidden_states"].shape[1]
    assert sent["encoder_hidden_states_mask"].sum() == count
    for name, mine in sent.items():
        if name == "img_shapes":
            assert mine == stock[name]
        elif name in ("hidden_states", "timestep"):
            torch.testing.assert_close(mine, stock[name], atol=1e-4, rtol=1e-4)
    states = stock["encoder_hidden_states"]
    errors = (sent["encoder_hidden_states"][:, :count] - states).abs()
    assert errors.mean() < 0.002 * states.std()  # Pillow and torchvision round resized pixels differently


def test_the_prompts_last_tokens_learn_the_answers_first_ones() -> None:
    from recipes.miniature import data

    text, label, weight = data.reply_rows("Make it read this.", "HELLOS,dc")
    asked, end, answer = (data.encode("Make it read this."), data.closing(), data.encode("HELLOS,dc"))
    last = len(asked) + len(end) - 1
    assert text[: last + 1].tolist() == [*asked, *end]
    assert label[last : last + len(answer)].tolist() == answer  # next token, from the template's last one on
    assert label[last - 7 : last + 1].tolist() == answer[7::-1]  # all of it
    assert len(answer) == 8
    assert set(np.flatnonzero(label >= 0)) == set(np.flatnonzero(weight))


def test_the_workers_tokenizer_is_the_shipped_one() -> None:
    from recipes.miniature import data

    shipped = tokens.build_tokenizer()
    text = (
        tokens.TEMPLATE_PREFIX + 'Remove the word "DTOV".<|im_end|>\n<|im_start|>assistant\ndc"X" naïve 你好'
    )
    assert data.encode(text) == shipped(text)["input_ids"]


def test_an_image_that_is_not_reduced_is_the_processors_own() -> None:
    from recipes.miniature import data

    rows = data.dialogues("test", 0, 3, sides=(data.IMAGE,))
    inputs = miniature.target_processor().image_processor(list(rows["full"][:, 0]), return_tensors="pt")
    same = miniature.target_processor().image_processor(list(rows["small"][:, 0]), return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], same["pixel_values"], atol=0.02, rtol=0)
    reduced = data.dialogues("test", 0, 3)
    assert (reduced["text"] == rows["text"]).all()
    assert (reduced["small"] != rows["small"]).any()


@pytest.mark.slow
def test_every_prompt_and_answer_of_the_world_fits_the_rows() -> None:
    from recipes.miniature import data

    for shown in (1, 2):
        data.dialogues("train", 0, 150, shown, finding=0.3, primer=20)
        data.edit_pairs("train", 0, 60, shown)


def test_reading_asks_for_the_words_of_every_image() -> None:
    from recipes.miniature import data

    rows = data.dialogues("test", 0, 3, reading=1.0)
    asked = data.encode(questions.read_question(Scene(128, "wood", "grey", 0))[0])
    assert all(row[: len(asked)].tolist() == asked for row in rows["text"])


def test_hard_cases_are_measured_in_all_arms_now_and_then() -> None:
    from argparse import Namespace

    from recipes.miniature import measure

    arguments = Namespace(cases=40, rarely=4, split="test", seed=1)
    cases, others = measure.cases_of(arguments, "size", "space")
    count = -(-40 // len(world.KINDS["space"]))
    assert len(cases) == count
    assert list(others) == [case.case_id for case in cases[::4]]
    assert all(other.case_id != case_id and other.kind == "size" for case_id, other in others.items())
    assert measure.cases_of(arguments, "swap", "space")[1] == {}
    explicit = measure.explicit_case(cases[0])
    assert explicit.prompt == cases[0].edit.explicit_prompt != cases[0].prompt


def test_the_cards_figures_pair_the_arms_of_a_case() -> None:
    from recipes.miniature import measure

    def record(case_id: str, arm: str, right: float) -> dict[str, Any]:
        metrics = {"right": right, "unedited_ssim": 0.5}
        return {"case_id": case_id, "group": "space", "kind": "size", "arm": arm, "metrics": metrics}

    rows = {
        row["name"]: row["value"]
        for row in measure.edit_rows(
            [
                record("a", "baseline", 0.0),
                record("a-explicit", "baseline", 1.0),
                record("a", "shuffled-image", 0.0),
                record("b", "baseline", 1.0),
                record("b-explicit", "baseline", 1.0),
            ]
        )
    }
    assert rows["hard space/size: as-asked"] == 0.5
    assert rows["headroom: space, explicit-prompt minus as-asked"] == 0.5
    assert rows["use of vision: space, as-asked minus shuffled-image"] == 0
    assert rows["edit: SSIM of the unedited region"] == 0.5


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Call the script's main in this process."""
    import importlib

    module = importlib.import_module(f"recipes.miniature.{script}")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    module.main()


TINY = ("--steps", 2, "--batch", 2, "--pool", 8, "--workers", 0, "--log-every", 1, "--device", "cpu")


@pytest.mark.slow
def test_training_the_vae_runs_resumes_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    run("train_vae", monkeypatch, "--folder", tmp_path, "--cases", 2, *TINY)
    run("train_vae", monkeypatch, "--folder", tmp_path, "--cases", 2, *TINY, "--steps", 3)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [1, 2, 3]
    result = json.loads((tmp_path / "result.json").read_text())
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    assert vae.config.latents_std == result["latents_std"] != miniature.VAE["latents_std"]
    assert result["steps"] == 3


@pytest.mark.slow
def test_training_a_vision_language_model_runs_resumes_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    options = ("--role", "target", "--folder", tmp_path, "--cases", 4, "--two-every", 2)
    run("train_vlm", monkeypatch, *options, *TINY)
    run("train_vlm", monkeypatch, *options, *TINY, "--steps", 3)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [1, 2, 3]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "target")
    assert model.config.vision_config.patch_size == miniature.TARGET_VISION["patch_size"]
    assert {"letters", "words", "first_token"} <= set(json.loads((tmp_path / "result.json").read_text()))
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_training_the_transformer_runs_and_packs_into_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_folder: Path, editor_folder: Path
) -> None:
    import diffusers

    frozen = ("--target", editor_folder / "text_encoder", "--vae", editor_folder / "vae")
    run("train_dit", monkeypatch, *frozen, "--folder", tmp_path / "dit", "--two-every", 2, *TINY)
    parts = ("--source", source_folder, *frozen, "--transformer", tmp_path / "dit" / "transformer")
    run("pack", monkeypatch, *parts, "--output", tmp_path / "packed")
    pipe = diffusers.QwenImageEditPlusPipeline.from_pretrained(tmp_path / "packed" / "editor")
    assert len(pipe.tokenizer(tokens.TEMPLATE_PREFIX)["input_ids"]) == 64
