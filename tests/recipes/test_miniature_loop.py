"""The loop resumes bit by bit with both optimisers, batches are rendered samples, processes share a model."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.forked import run_forked


def make_loop(folder: Path, steps: int = 6, muon: float = 0.0) -> Any:
    from recipes.miniature.loop import Loop, Settings, start

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))

    def loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy = batch["x"] + 0.1 * torch.randn_like(batch["x"])
        return {"loss": (model(noisy) - batch["x"].sum(-1, keepdim=True)).square().mean()}

    settings = Settings(steps=steps, learning_rate=0.05, warmup=2, log_every=2, muon=muon, seed=3)
    return Loop(folder, model, loss, settings, start("cpu"))


def batches(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(5 + step % 2, 4)}  # two layouts


def stop_after(loop: Any, steps: int) -> None:
    """Run as many steps and stop there, as a signal or the clock would."""
    import signal

    def interrupt(step: int) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not loop.run(batches, interrupt)


@pytest.mark.parametrize("muon", [0.0, 2.0])
def test_a_resumed_run_ends_in_the_same_bits_as_an_unbroken_one(tmp_path: Path, muon: float) -> None:
    unbroken = make_loop(tmp_path / "one", muon=muon)
    assert unbroken.run(batches)
    stop_after(make_loop(tmp_path / "two", muon=muon), 4)
    resumed = make_loop(tmp_path / "two", muon=muon)
    assert len(resumed.optimizers) == 1 + bool(muon)
    assert resumed.resume()
    assert resumed.step == 4
    assert resumed.run(batches)
    for name, value in unbroken.trained.items():
        assert torch.equal(value, resumed.trained[name]), name
    for value, other in zip(unbroken.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(value, other)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    stop_after(make_loop(tmp_path), 2)
    loop = make_loop(tmp_path)
    loop.trained["more"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="more"):
        loop.resume()


def test_averaged_weights_are_swapped_in_and_out_again(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.run(batches)
    before = {name: value.clone() for name, value in loop.trained.items()}
    with loop.averaged():
        for (name, value), average in zip(loop.trained.items(), loop.ema.shadow_params, strict=True):
            assert torch.equal(value, average)
            assert not torch.equal(value, before[name])
    for name, value in loop.trained.items():
        assert torch.equal(value, before[name])


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    from recipes.miniature import loop as module

    stop_after(make_loop(tmp_path), 2)
    before = (tmp_path / module.CHECKPOINT).read_bytes()
    loop = make_loop(tmp_path)
    loop.resume()
    with pytest.raises(FloatingPointError):
        loop.run(lambda step: {"x": torch.full((2, 4), torch.nan)})
    assert (tmp_path / module.CHECKPOINT).read_bytes() == before


def test_muon_has_the_matrices_between_hidden_states_alone() -> None:
    from recipes.miniature.loop import is_hidden
    from recipes.miniature.models import build_transformer

    names = {name for name, p in build_transformer(0).named_parameters() if is_hidden(name, p)}
    assert "transformer_blocks.0.attn.to_q.weight" in names
    assert "transformer_blocks.5.txt_mlp.net.2.weight" in names
    for other in ("img_in", "txt_in", "proj_out", "norm_out", "img_mod", "txt_mod", "time_text", "bias"):
        assert not any(other in name for name in names), other


def numbers(broken: int, first: int, count: int) -> dict[str, np.ndarray]:
    if first == broken:
        raise ValueError("the colour is out")
    return {"index": np.arange(first, first + count)}


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.miniature import loop as module

    loop = make_loop(tmp_path)
    stop_after(loop, 2)
    before = (tmp_path / module.CHECKPOINT).read_bytes()

    def half(_tensors: object, path: Path, _metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        loop.save()
    assert (tmp_path / module.CHECKPOINT).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {module.CHECKPOINT, "log.jsonl"}


def test_batches_are_drawn_from_the_samples_rendered_last() -> None:
    from recipes.miniature.feed import Replay

    replay = Replay(partial(numbers, -1), batch=4, capacity=8, first=100, draws=20)
    drawn = [set(batch["index"].tolist()) for batch in itertools.islice(replay, 60)]
    assert set.union(*drawn[:20]) == set(range(100, 104))
    assert set.union(*drawn[40:]) == set(range(104, 112))  # the oldest four are gone


@pytest.mark.slow
def test_workers_render_different_samples_and_end_with_the_feed() -> None:
    import multiprocessing

    from recipes.miniature.feed import Replay, loader

    others = multiprocessing.active_children()  # of earlier tests
    rendered = iter(loader(Replay(partial(numbers, -1), batch=3, capacity=9, draws=1), workers=2))
    first, second = (set(next(rendered)["index"].tolist()) for _ in range(2))
    assert first <= {0, 1, 2}
    assert second <= {3, 4, 5}
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    del rendered
    for worker in workers:
        worker.join(timeout=30)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.slow
def test_the_feed_raises_what_its_workers_raise() -> None:
    from recipes.miniature.feed import Replay, loader

    with pytest.raises(ValueError, match="the colour is out"):
        next(iter(loader(Replay(partial(numbers, 0), batch=3, capacity=9), workers=1)))


@pytest.mark.slow
def test_a_single_image_does_not_meet_what_is_set_to_zero() -> None:
    from diffusers import AutoencoderKLQwenImage

    from recipes.miniature import build as miniature
    from recipes.miniature.models import build_vae

    stock, vae = miniature.randomise(AutoencoderKLQwenImage(**miniature.VAE), 1), build_vae(1)
    x = torch.rand(1, 3, 1, 48, 32) * 2 - 1
    with torch.no_grad():
        z = stock.encode(x).latent_dist.mode()
        torch.testing.assert_close(vae.encode(x).latent_dist.mode(), z, atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(z).sample, stock.decode(z).sample, atol=1e-4, rtol=0)
    assert sum(int((p == 0).sum()) for p in vae.parameters()) > 1e6


IMPORTS = """
from pathlib import Path
import torch, torch._dynamo
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from recipes.miniature.loop import Loop, Settings, start
"""
RUN = """
def run(folder):
    accelerator = start("cpu")
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    unused = model.register_parameter("unused", torch.nn.Parameter(torch.zeros(8, 8)))
    seen = []

    def loss(batch):
        return {"loss": (model(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().mean()}

    def batch(step):
        seen.append(torch.randn(3, 4))
        return {"x": seen[-1]}

    settings = Settings(steps=9, learning_rate=0.01, muon=1.0, log_every=5, seed=3)
    loop = Loop(Path(folder), model, loss, settings, accelerator)
    loop.run(batch)
    weights = accelerator.gather(torch.cat([p.detach().flatten() for p in model.parameters()])[None])
    firsts = accelerator.gather(seen[0].sum()[None])
    if accelerator.is_main_process:
        apart = float((weights[0] - weights[1]).abs().max())
        print(f"processes {loop.step} apart {apart:.6f} data {float((firsts[0] - firsts[1]).abs()):.6f}")

"""


@pytest.mark.slow
def test_processes_see_data_of_their_own_and_share_one_model(tmp_path: Path) -> None:
    printed = run_forked(IMPORTS, RUN, f"processes(2, {str(tmp_path / 'run')!r})", tmp_path)
    line = next(line for line in printed.splitlines() if line.startswith("processes "))
    _, step, _, apart, _, data = line.split()
    assert int(step) == 9
    assert float(apart) == 0
    assert float(data) > 0.01
