"""Muon's updates are orthogonal, a resumed run keeps its moments, and peers end with one model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_orthogonal_keeps_directions_and_levels_strengths(shape: tuple[int, int]) -> None:
    from recipes.miniature.muon import orthogonal

    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = left * torch.linspace(1, 0.1, min(shape)) @ right
    made = orthogonal(matrices)
    along = left.transpose(1, 2) @ made @ right.transpose(1, 2)  # diagonal where the directions are kept
    levelled = torch.diagonal(along, dim1=1, dim2=2)
    # Five rounds leave singular values between about 0.7 and 1.2; nothing mixes directions.
    assert ((levelled > 0.6) & (levelled < 1.3)).all()
    assert (along - torch.diag_embed(levelled)).abs().max() < 0.02


def test_muon_has_the_matrices_between_hidden_states_alone() -> None:
    from recipes.miniature.editor import build_transformer
    from recipes.miniature.muon import is_hidden

    names = {name for name, p in build_transformer(0).named_parameters() if is_hidden(name, p)}
    assert "transformer_blocks.0.attn.to_q.weight" in names
    assert "transformer_blocks.5.txt_mlp.net.2.weight" in names
    for other in ("img_in", "txt_in", "proj_out", "norm_out", "img_mod", "txt_mod", "time_text", "bias"):
        assert not any(other in name for name in names), other


def test_muon_resumes_in_the_same_bits(tmp_path: Path) -> None:
    from recipes.miniature.loop import Loop, Settings

    def run(folder: Path, steps: int) -> nn.Module:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))

        def loss(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": (model(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().mean()}

        settings = Settings(steps=steps, learning_rate=0.01, warmup=1, muon=2.0, log_every=2, seed=3)
        loop = Loop(folder, model, loss, settings)
        loop.resume()
        loop.settings = Settings(steps=6, learning_rate=0.01, warmup=1, muon=2.0, log_every=2, seed=3)
        while loop.step < steps:
            torch.manual_seed(loop.step)
            loop._stepper.advance({"x": torch.randn(5, 4)}, 0.01, 0.9)
            loop.step += 1
        loop.save()
        return model

    unbroken = run(tmp_path / "one", 6)
    run(tmp_path / "two", 3)
    resumed = run(tmp_path / "two", 6)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


PEER = """
import sys
from pathlib import Path

from recipes.miniature import peers
import torch
from recipes.miniature.loop import Loop, Settings

torch.manual_seed(5)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
seen = []

def loss(batch):
    return {"loss": (model(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().mean()}

def batch(step):
    seen.append(torch.randn(3, 4))
    return {"x": seen[-1]}

with peers.together(torch.device("cpu")):
    settings = Settings(steps=17, learning_rate=0.01, muon=1.0, share_every=4, log_every=5, seed=3)
    loop = Loop(Path(sys.argv[1]), model, loss, settings)
    loop.run(batch)
    before = [p.detach().clone() for p in model.parameters()]
    peers.average([p.detach() for p in model.parameters()])
    apart = max(float((a - b).abs().max()) for a, b in zip(before, model.parameters()))
    first = float(seen[0].sum())
    firsts = [torch.zeros(1), torch.zeros(1)]
    torch.distributed.all_gather(firsts, torch.tensor([first]))
    if peers.rank() == 0:
        print(f"peers {loop.step} apart {apart:.6f} data {float((firsts[0] - firsts[1]).abs()):.6f}")
"""


@pytest.mark.slow
def test_peers_see_data_of_their_own_and_share_one_model(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("peers "))
    _, step, _, apart, _, data = line.split()
    assert int(step) == 17
    assert 0 < float(apart) < 0.02  # one step since they last shared, and no more
    assert float(data) > 0.01
