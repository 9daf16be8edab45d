"""Train the miniature's VAE, the stock class, on single 128×128 images of the world.

    python -m recipes.miniature.train_vae --folder runs/vae --steps 16000 --minutes 9

Run it again to continue from the folder's checkpoint. At the end it writes the averaged weights in stock
layout, loads them again with stock code, measures them and writes result.json.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_vision_bridge.io import provenance, write_json
from qwen_vision_bridge.loading.memory import device_name

from . import build as miniature
from .data import images
from .feed import PROCESS_SAMPLES, Replay, loader, to_device
from .flags import stage_parser
from .loop import Loop, Settings, plot_log, start
from .models import build_vae

MEASURE_EVERY = 2000  # steps
STATISTICS = 4096  # images behind the latents' mean and std


def main() -> None:
    """Train, measure, save, measure what was saved."""
    arguments = _arguments()
    torch.set_float32_matmul_precision("high")
    accelerator = start(arguments.device)
    vae = build_vae(arguments.seed, arguments.start)
    if arguments.compile:
        for part in (vae.encoder, vae.decoder):
            part.compile()
    settings = Settings.from_flags(arguments, arguments.seed)
    loop = Loop(arguments.folder, vae, partial(loss, vae), settings, accelerator)
    loop.resume()
    held_out = torch.from_numpy(images("validation", 0, arguments.cases)).to(accelerator.device)
    first = arguments.first + PROCESS_SAMPLES * accelerator.process_index
    rendered = Replay(partial(make_images, "train"), arguments.batch, arguments.pool, first)
    batches = iter(loader(rendered, arguments.workers))

    def measure(step: int) -> None:
        if step % MEASURE_EVERY == 0:
            with loop.averaged():
                accelerator.print(f"PSNR {psnr_of(vae, held_out).mean():.2f} dB", flush=True)
            loop.save()

    loop.run(lambda _step: to_device(next(batches), accelerator.device), measure)
    if accelerator.is_main_process:
        plot_log(arguments.folder)
        with loop.averaged():
            count = min(STATISTICS, arguments.pool)
            latents = torch.cat([latents_of(vae, next(batches)) for _ in range(-(-count // arguments.batch))])
            figures = finish(vae, latents, held_out, arguments.output or arguments.folder / "vae")
        write_result(figures, loop, arguments)


def _arguments() -> argparse.Namespace:
    defaults = {"batch": 96, "learning_rate": 6e-4, "workers": 14, "log_every": 50}
    parser = stage_parser(__doc__, **defaults)
    parser.add_argument("--cases", type=int, default=512, help="held-out images to measure on")
    return parser.parse_args()


def make_images(split: str, first: int, count: int) -> dict[str, np.ndarray]:
    """Training data: `image` uint8 (count, 128, 128, 3)."""
    return {"image": images(split, first, count)}


def to_range(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → [-1, 1] (B, 3, 1, H, W)."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def loss(vae: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """L1 + 2·MSE + ½·L1 of the differences of neighbours + 1e-4·KL, each a mean over its elements.

    The encoder and decoder are called by themselves: `vae.decode` clamps, which would stop gradients.
    """
    x = to_range(batch["image"])
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    difference = vae.decoder(vae.post_quant_conv(z)).float() - x
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    l1, mse = difference.abs().mean(), difference.square().mean()
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return {"loss": l1 + 2 * mse + 0.5 * edges + 1e-4 * kl, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


@torch.no_grad()
def psnr_of(vae: nn.Module, images: Tensor, batch: int = 32) -> np.ndarray:
    """PSNR of each image's reconstruction from the latents that the pipeline takes, dB (B,).

    Args:
        images: uint8 (B, H, W, 3) on the VAE's device.
    """
    errors = []
    for x in map(to_range, images.split(batch)):
        restored = vae.decode(vae.encode(x).latent_dist.mode()).sample
        errors.append((restored - x).square().flatten(1).mean(1))
    return (10 * torch.log10(4 / torch.cat(errors).double().clamp(min=1e-10))).cpu().numpy()


@torch.no_grad()
def latents_of(vae: nn.Module, batch: dict[str, np.ndarray]) -> Tensor:
    """Every position's latents, (B·h·w, C), of images as `make_images` renders them."""
    x = to_range(torch.from_numpy(batch["image"]).to(vae.device))
    return vae.encode(x).latent_dist.mode().transpose(0, 1).flatten(1).T.double()


def finish(vae: nn.Module, latents: Tensor, held_out: Tensor, output: Path) -> dict[str, Any]:
    """Put the latents' statistics in the config, save in stock layout, load with stock code, measure.

    Args:
        latents: (N, C), of training images. held_out: uint8 (B, H, W, 3) on the VAE's device.

    Returns:
        Figures by name.
    """
    from diffusers import AutoencoderKLQwenImage

    mean, std = ([round(v, 5) for v in values.tolist()] for values in (latents.mean(0), latents.std(0)))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    miniature.save_weights(copy.deepcopy(vae).cpu(), output)
    shipped = AutoencoderKLQwenImage.from_pretrained(output, torch_dtype=torch.float32)
    saved = psnr_of(shipped.to(held_out.device).eval(), held_out)
    return {
        "PSNR of the averaged weights, dB": float(psnr_of(vae, held_out).mean()),
        "PSNR as shipped (bf16 on disk, stock code in fp32), dB": float(saved.mean()),
        "PSNR as shipped, worst percentile, dB": float(np.percentile(saved, 1)),
        "latents_mean": mean,
        "latents_std": std,
    }


def write_result(figures: dict[str, Any], loop: Loop, arguments: argparse.Namespace) -> None:
    """Print the figures, and write them with their provenance to result.json."""
    device = device_name(loop.accelerator.device)
    about = provenance([arguments.seed], device, steps=loop.step, seconds=round(loop.seconds, 1))
    result = {**figures, "cases": arguments.cases, **about}
    print("\n".join(f"{name}: {value}" for name, value in result.items()), flush=True)
    write_json(arguments.folder / "result.json", result)


if __name__ == "__main__":
    main()
