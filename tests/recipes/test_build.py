"""The miniature is a complete small family that unmodified `from_pretrained` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vision_bridge.loading import checkpoints
from qwen_vision_bridge.loading.checkpoints import SHIPPED, locate
from recipes.miniature import build as miniature
from recipes.miniature import tokenizer as tokens


def test_the_template_prefix_is_exactly_64_tokens(shared_pipe: Any) -> None:
    prefix = shared_pipe.prompt_template_encode.partition("{}")[0]
    assert prefix == tokens.TEMPLATE_PREFIX
    assert (
        len(shared_pipe.tokenizer(prefix)["input_ids"]) == 64 == shared_pipe.prompt_template_encode_start_idx
    )


def test_the_tokenizer_is_of_the_qwen2_format_and_loses_nothing(shared_pipe: Any) -> None:
    tokenizer = shared_pipe.tokenizer
    text = 'Replace "CAFÉ" by "你好" — naïve 12%'
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.convert_tokens_to_ids(list(tokens.SPECIAL_TOKENS))
    assert len(set(ids)) == len(tokens.SPECIAL_TOKENS)
    assert tokenizer(" ".join(tokens.SPECIAL_TOKENS))["input_ids"].count(ids[0]) == 1


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


def test_the_package_ships_trained_weights_with_their_card(source_folder: Path, editor_folder: Path) -> None:
    """Trained, not built: the VAE gives an image back."""
    import numpy as np
    from diffusers import AutoencoderKLQwenImage

    from qwen_vision_bridge.evaluation.metrics.pixels import masked_psnr
    from qwen_vision_bridge.synthetic.cases import make_cases

    assert {source_folder.parent, editor_folder.parent} == {SHIPPED}
    image = np.asarray(make_cases("space", 1, split="novel")[0].image)
    vae = AutoencoderKLQwenImage.from_pretrained(editor_folder / "vae")
    x = torch.from_numpy(image).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        back = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample[0, :, 0].float()
    pixels = ((back.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    assert masked_psnr(pixels, image, np.ones(image.shape[:2], bool)) > 27


def test_every_figure_of_the_card_says_how_it_was_made() -> None:
    rows = json.loads((SHIPPED / "card.json").read_text())
    assert {"VAE: PSNR, dB", "reading: letters right, source"} <= {row["name"] for row in rows}
    for row in rows:
        assert {"name", "value", "n", "ci_low", "ci_high", "seed", "command", "date", "device"} == set(row)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_the_builder_is_seeded(tmp_path: Path) -> None:
    one, same, other = (
        (miniature.build(tmp_path / name, "source", seed) / "model.safetensors").read_bytes()
        for name, seed in (("one", 0), ("same", 0), ("other", 5))
    )
    assert one == same != other


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_target_features_depend_on_image_and_prompt(pipe: Any, photo: Any) -> None:
    """Models this small hardly react at transformers' own initialisation; see `randomise`."""
    from qwen_vision_bridge.patches import mrope_positions

    with torch.no_grad(), mrope_positions(pipe):
        one, _ = pipe.encode_prompt("make it red", image=[photo])
        other, _ = pipe.encode_prompt("make it red", image=[photo.rotate(180)])
        words, _ = pipe.encode_prompt("make it sea", image=[photo])
    assert (one - other).abs().mean() > 0.05 * one.abs().mean()
    assert (one[:, -8:] - words[:, -8:]).abs().mean() > 0.01 * one.abs().mean()


def test_other_locations_pass_and_missing_weights_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate("Qwen/Qwen3-VL-8B-Instruct") == "Qwen/Qwen3-VL-8B-Instruct"
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        locate("builtin:editor")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ocr/change_text", "space/move_corner", "detail/recolour_object"])
def test_the_shipped_miniature_does_what_it_is_told(kind: str, pipe: Any) -> None:
    from qwen_vision_bridge.evaluation.metrics.correctness import judge
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit
    from qwen_vision_bridge.synthetic.cases import make_cases

    group, name = kind.split("/")
    (case,) = make_cases(group, 1, seed=3, kinds=(name,))
    editor = EnhancedQwenImageEdit("miniature", bridge="fresh", pipe=pipe, dtype=torch.float32)
    assert not judge(case, case.image).right  # doing nothing is not enough
    edited = editor.generate(case.image, case.prompt, use_qwen3_vision=False, seed=0)
    assert judge(case, edited).right
