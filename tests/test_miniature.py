"""The miniature is a complete small family that unmodified `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vision_bridge import miniature


def test_the_template_prefix_is_exactly_64_tokens(shared_pipe: Any) -> None:
    prefix = shared_pipe.prompt_template_encode.partition("{}")[0]
    assert prefix == miniature.TEMPLATE_PREFIX
    assert (
        len(shared_pipe.tokenizer(prefix)["input_ids"]) == 64 == shared_pipe.prompt_template_encode_start_idx
    )


def test_the_tokenizer_is_of_the_qwen2_format_and_loses_nothing(shared_pipe: Any) -> None:
    tokenizer = shared_pipe.tokenizer
    text = 'Replace "CAFÉ" by "你好" — naïve 12%'
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.convert_tokens_to_ids(list(miniature.SPECIAL_TOKENS))
    assert len(set(ids)) == len(miniature.SPECIAL_TOKENS)
    assert tokenizer(" ".join(miniature.SPECIAL_TOKENS))["input_ids"].count(ids[0]) == 1


def test_words_become_letters_so_that_they_can_be_spelled(shared_pipe: Any) -> None:
    assert shared_pipe.tokenizer.tokenize('"DTOV"') == ['"', "D", "T", "O", "V", '"']


def test_all_files_together_stay_below_40_mb_and_each_below_15(
    source_folder: Path, editor_folder: Path
) -> None:
    files = [
        path for folder in (source_folder, editor_folder) for path in folder.rglob("*") if path.is_file()
    ]
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes) <= 40e6
    assert max(sizes) < 15e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_builder_is_seeded(tmp_path: Path, source_folder: Path) -> None:
    same = miniature.build(tmp_path / "same", "source") / "model.safetensors"
    other = miniature.build(tmp_path / "other", "source", seed=5) / "model.safetensors"
    shipped = (source_folder / "model.safetensors").read_bytes()
    if not miniature.is_shipped():
        assert same.read_bytes() == shipped
    assert other.read_bytes() != shipped


def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, seed: int) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(miniature, "_write_source", interrupted)
        with pytest.raises(KeyboardInterrupt):
            miniature.build(tmp_path, "source")
    assert list(tmp_path.iterdir()) == []
    assert (miniature.build(tmp_path, "source") / "model.safetensors").is_file()


def test_the_target_tower_listens_to_the_picture_and_the_dit_to_the_prompt(pipe: Any, photo: Any) -> None:
    """Models this small go deaf at transformers' own initialisation; see `randomise`."""
    from qwen_vision_bridge.injection import mrope_positions

    with torch.no_grad(), mrope_positions(pipe):
        one, _ = pipe.encode_prompt("make it red", image=[photo])
        other, _ = pipe.encode_prompt("make it red", image=[photo.rotate(180)])
        words, _ = pipe.encode_prompt("make it sea", image=[photo])
    assert (one - other).abs().mean() > 0.05 * one.abs().mean()
    assert (one[:, -8:] - words[:, -8:]).abs().mean() > 0.01 * one.abs().mean()


def test_other_locations_pass_unchanged() -> None:
    assert miniature.locate("Qwen/Qwen3-VL-8B-Instruct") == "Qwen/Qwen3-VL-8B-Instruct"
