"""LPIPS is measured where its weights are, by the published formula, and left out with a word elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vision_bridge.evaluation.evaluate import evaluate
from qwen_vision_bridge.evaluation.metrics import lpips as perceptual
from qwen_vision_bridge.evaluation.scoring import measure
from qwen_vision_bridge.synthetic.cases import make_cases


@pytest.fixture(scope="module")
def saved_alexnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random network of the right shape, and its file."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    model = alexnet(weights=None)
    path = tmp_path_factory.mktemp("alexnet") / perceptual.WEIGHTS["alex"]
    torch.save(model.state_dict(), path)
    return path, model


@pytest.fixture
def random_alexnet(
    saved_alexnet: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The network in the folder where torch.hub keeps the real one."""
    path, model = saved_alexnet
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / path.name).symlink_to(path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    perceptual._network.cache_clear()
    yield model
    perceptual._network.cache_clear()


def test_lpips_follows_the_published_formula(random_alexnet: Any, photo: Image.Image) -> None:
    other = photo.rotate(3)
    heads = perceptual._network("alex").lins
    mean, std = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    maps = []
    for image in (photo, other):
        hidden = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1 - mean) / std
        found, hidden = [], hidden[None]
        for index, layer in enumerate(random_alexnet.features):
            hidden = layer(hidden)
            if index in (1, 4, 7, 9, 11):  # behind every ReLU
                found.append(hidden / hidden.norm(dim=1, keepdim=True))
        maps.append(found)
    expected = sum(
        (head.model[-1].weight * (a - b) ** 2).sum(1).mean() for head, a, b in zip(heads, *maps, strict=True)
    )
    assert perceptual.lpips(photo, other) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert perceptual.lpips(photo, photo) == 0
    kept = np.zeros((photo.height, photo.width), bool)
    kept[:40] = True
    below = np.asarray(photo).copy()
    below[60:] = 0
    assert perceptual.lpips(photo, Image.fromarray(below), mask=kept) == 0
    with pytest.raises(ValueError, match="same size"):
        perceptual.lpips(photo, photo.resize((80, 80)))


def test_lpips_is_in_the_metrics_where_its_weights_are(random_alexnet: Any) -> None:
    case = make_cases("detail", 1)[0]
    assert measure(case, case.image)["unedited_lpips_alex"] == 0
    assert "unedited_lpips_squeeze" not in measure(case, case.image)


class Planted:
    """What a pickle runs when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("random_alexnet")
def test_nothing_but_tensors_is_taken_out_of_a_weights_file(tmp_path: Path, photo: Image.Image) -> None:
    ran, weights = tmp_path / "ran", tmp_path / "hub" / "checkpoints" / perceptual.WEIGHTS["alex"]
    weights.unlink()  # a link, whose target stays as it is
    torch.save({"weight": Planted(ran)}, weights)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        perceptual.lpips(photo, photo)
    assert not ran.exists()


@pytest.mark.slow
def test_without_weights_lpips_is_left_out_with_a_word(
    editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    case = make_cases("detail", 1)[0]
    assert not any("lpips" in name for name in measure(case, case.image))
    found = evaluate(editor, [case], tmp_path, perception=False, num_inference_steps=2)
    says = [line for line in found.left_out if line.startswith("LPIPS")]
    assert "no alexnet-owt-7be5be79.pth in" in says[0]
    with pytest.raises(ValueError, match="LPIPS cannot be measured"):
        perceptual.lpips(case.image, case.target)
