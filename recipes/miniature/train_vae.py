"""Train the miniature's VAE, the stock class, on single 128×128 images of the world.

    python -m recipes.miniature.train_vae --folder runs/vae --steps 16000 --minutes 9

Run it again to continue from the folder's checkpoint. At the end it writes the averaged weights in stock
layout, loads them again with stock code, measures them and writes result.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_vision_bridge.io import write_json
from qwen_vision_bridge.loading.memory import device_name

from .feed import Feed, chunks
from .loop import Loop, Settings, plot_log
from .measure_vae import finish, psnr_of, to_range, worst_percentile
from .single_frame import as_images, prepare
from .stepper import Loss, compiles

CHUNK = 64  # images
FIRST_BATCHES = 64  # rendered before training begins
MEASURE_EVERY = 2000  # steps
STATISTICS = 4096  # images behind the latents' mean and std


def main() -> None:
    """Train, measure, save, measure what was saved."""
    arguments = _arguments()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    rendered = render("validation", arguments.cases, arguments.workers)
    vae = prepare(arguments.seed, arguments.start)
    device = torch.device(arguments.device)
    chunk, pool = min(CHUNK, arguments.pool), arguments.pool
    make = partial(make_images, "train")
    with Feed(make, chunk, arguments.workers, pool, device, arguments.first) as feed:
        feed.fill(FIRST_BATCHES * arguments.batch)
        vae.to(device)
        held_out = torch.from_numpy(rendered).to(device)
        loop = train(vae, feed, held_out, arguments)
        plot_log(arguments.folder)
        with loop.averaged():
            output = arguments.output or arguments.folder / "vae"
            index = torch.arange(min(STATISTICS, feed.pool.filled), device=device)
            rows = finish(vae, feed.pool.gather(index)["image"], held_out, output, arguments.seed)
        write_result(rows, loop, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, log and results")
    parser.add_argument("--output", type=Path, help="the finished VAE in stock layout (FOLDER/vae)")
    parser.add_argument("--start", help="a stock folder to start from instead of random weights")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, help="stop training after so many minutes")
    parser.add_argument("--cosine-minutes", type=float, help="let the rate fall with time, not with steps")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--pool", type=int, default=100_000, help="images kept on the device")
    parser.add_argument("--first", type=int, default=0, help="index of the first image to render")
    parser.add_argument("--cases", type=int, default=512, help="held-out images to measure on")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=cuda, help="torch.compile"
    )
    return parser.parse_args()


def make_images(split: str, first: int, count: int) -> dict[str, np.ndarray]:
    """One chunk of training data: `image` uint8 (count, 128, 128, 3)."""
    from .data import images

    return {"image": images(split, first, count)}


def render(split: str, count: int, workers: int) -> np.ndarray:
    """The first images of a split: uint8 (count, 128, 128, 3)."""
    size = min(CHUNK, -(-count // max(workers, 1)))
    firsts = range(0, count, size)
    rendered = [chunk["image"] for chunk in chunks(partial(make_images, split), size, workers, firsts)]
    return np.concatenate(rendered)[:count]


def loss(vae: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """L1 + 2·MSE + ½·L1 of the differences of neighbours + 1e-4·KL, each a mean over its elements."""
    x = to_range(batch["image"])
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    difference = vae.decoder(vae.post_quant_conv(z)).float() - x
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    l1, mse = difference.abs().mean(), difference.square().mean()
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return {"loss": l1 + 2 * mse + 0.5 * edges + 1e-4 * kl, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


def train(vae: nn.Module, feed: Feed, held_out: Tensor, arguments: argparse.Namespace) -> Loop:
    """Run the loop from the folder's checkpoint on."""
    settings = Settings(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        minutes=arguments.minutes,
        cosine_minutes=arguments.cosine_minutes,
        log_every=arguments.log_every,
        seed=arguments.seed,
    )
    compute: Loss = partial(loss, vae)

    def batch(_step: int) -> dict[str, Tensor]:
        feed.refill()
        return feed.pool.sample(arguments.batch)

    with as_images(vae):
        if arguments.compile:
            fast = torch.compile(compute, dynamic=False)
            compute = fast if compiles(fast, [batch(0)], list(vae.parameters())) else compute
        loop = Loop(arguments.folder, vae, compute, settings, graphs=not arguments.no_graphs)
        loop.resume()

        def measure(step: int, _row: dict[str, float]) -> None:
            if step % MEASURE_EVERY == 0:
                with loop.averaged():
                    psnr = psnr_of(vae, held_out)
                print(f"PSNR {psnr.mean():.2f} dB, worst percentile {worst_percentile(psnr):.2f}", flush=True)
                loop.save()

        loop.run(batch, measure)
    return loop


def write_result(rows: list[dict[str, Any]], loop: Loop, arguments: argparse.Namespace) -> None:
    """Write the measurements and their provenance to result.json."""
    rows = [
        *rows,
        {"name": "training steps", "value": loop.step, "n": 1},
        {"name": "training time, s", "value": round(loop.seconds, 1), "n": 1},
    ]
    device = device_name(loop.device)
    provenance = {"seed": arguments.seed, "command": shlex.join(sys.argv), "device": device}
    provenance["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        arguments.folder / "result.json", [{"ci_low": None, "ci_high": None, **r, **provenance} for r in rows]
    )


if __name__ == "__main__":
    main()
