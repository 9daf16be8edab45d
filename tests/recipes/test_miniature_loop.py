"""The loop resumes bit by bit, the feed renders every item in order, and the 2-D VAE is the stock one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def make_loop(folder: Path, steps: int = 6) -> Any:
    from recipes.miniature.loop import Loop, Settings

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))

    def loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy = batch["x"] + 0.1 * torch.randn_like(batch["x"])
        return {"loss": (model(noisy) - batch["x"].sum(-1, keepdim=True)).square().mean()}

    settings = Settings(steps=steps, learning_rate=0.05, warmup=2, log_every=2, seed=3)
    return Loop(folder, model, loss, settings)


def batches(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(5 + step % 2, 4)}  # two layouts


def stop_after(loop: Any, steps: int) -> None:
    """Run as many steps and stop there, as a signal or the clock would."""
    import os
    import signal

    def interrupt(step: int, _row: dict[str, float]) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not loop.run(batches, interrupt)


def test_a_resumed_run_ends_in_the_same_bits_as_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = make_loop(tmp_path / "one")
    assert unbroken.run(batches)
    stop_after(make_loop(tmp_path / "two"), 4)
    resumed = make_loop(tmp_path / "two")
    assert resumed.resume()
    assert resumed.step == 4
    assert resumed.run(batches)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(unbroken.ema_weights()[name], resumed.ema_weights()[name]), name


def test_averaged_weights_are_swapped_in_and_out_again(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.run(batches)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    with loop.averaged():
        for name, value in loop.model.state_dict().items():
            assert torch.equal(value, loop.ema_weights()[name])
            assert not torch.equal(value, before[name])
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, before[name])


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


@pytest.mark.slow
def test_chunks_come_in_order_from_several_processes() -> None:
    from recipes.miniature.feed import chunks

    rendered = chunks(partial(numbers, -1), 3, workers=2, firsts=range(20, 40, 3))
    assert np.concatenate([chunk["index"] for chunk in rendered]).tolist() == list(range(20, 41))


def test_a_feed_raises_what_its_workers_raise() -> None:
    from recipes.miniature.feed import Feed

    with (
        Feed(partial(numbers, 3), 3, workers=1, capacity=9, device="cpu") as feed,
        pytest.raises(ValueError, match="the colour is out"),
    ):
        feed.fill(6)


@pytest.mark.slow
def test_a_feed_ends_its_workers() -> None:
    import multiprocessing

    from recipes.miniature.feed import Feed

    others = multiprocessing.active_children()  # of earlier tests
    with Feed(partial(numbers, -1), 3, workers=1, capacity=5, device="cpu") as feed:
        feed.fill(5)
        assert feed.pool.filled == 5
        workers = [child for child in multiprocessing.active_children() if child not in others]
        assert len(workers) == 1
    for worker in workers:
        worker.join(timeout=30)
    assert not any(worker.is_alive() for worker in workers)


def test_a_full_pool_overwrites_its_oldest_items() -> None:
    from recipes.miniature.feed import Pool

    pool = Pool(5, "cpu")
    for first in (0, 3, 6):
        pool.add(numbers(-1, first, 3))
    assert pool.filled == 5
    assert sorted(pool.gather(torch.arange(5))["index"].tolist()) == [4, 5, 6, 7, 8]


def test_the_2d_vae_is_the_stock_vae_on_single_images() -> None:
    from recipes.miniature.single_frame import as_images, prepare

    vae = prepare(1)
    x = torch.rand(1, 3, 1, 48, 32) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        image = vae.decode(z).sample
        with as_images(vae):
            torch.testing.assert_close(vae.encode(x).latent_dist.mode(), z, atol=1e-4, rtol=0)
            torch.testing.assert_close(vae.decode(z).sample, image, atol=1e-4, rtol=0)
            with pytest.raises(ValueError, match="single frames"):
                vae.encoder(x.expand(-1, -1, 2, -1, -1))
        assert torch.equal(vae.decode(z).sample, image)
