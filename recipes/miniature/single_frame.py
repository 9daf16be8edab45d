"""The stock VAE on single images: exact 2-D arithmetic instead of causal convolutions over time.

An image is one frame after zeros: it meets only the last slice in time of a causal kernel, and none of the
layers that resample time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from . import build as miniature

TOLERANCE = 1e-3


def prepare(seed: int, start: str | None = None) -> nn.Module:
    """The stock VAE, seeded or from a folder, on the CPU; weights that a single image never meets are zero.

    Raises:
        RuntimeError: the zeros or the 2-D path change what the stock model does.
    """
    from diffusers import AutoencoderKLQwenImage

    if start:
        vae = AutoencoderKLQwenImage.from_pretrained(start, torch_dtype=torch.float32).eval()
    else:
        vae = miniature.randomise(AutoencoderKLQwenImage(**miniature.VAE), seed)
    x = torch.rand(2, 3, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    before = _stock(vae, x)
    with torch.no_grad():
        for name, conv in _causal_convolutions(vae):
            conv.weight[:, :, : None if name.endswith("time_conv") else -1] = 0
    after = _stock(vae, x)
    with as_images(vae), torch.no_grad():
        z = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0]
        flat = z, vae.decoder(vae.post_quant_conv(z)).clamp(-1, 1)
    for what, one, other in (("unmet slices at zero", before, after), ("2-D path", after, flat)):
        worst = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
        print(f"{what}: differs from the stock model by at most {worst:.2g}", flush=True)
        if not worst <= TOLERANCE:
            raise RuntimeError(f"{what}: latents or images differ from the stock model's by {worst}")
    return vae


@torch.no_grad()
def _stock(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    z = vae.encode(x).latent_dist.mode()
    return z, vae.decode(z).sample


def _causal_convolutions(vae: nn.Module) -> Iterator[tuple[str, nn.Conv3d]]:
    return ((name, part) for name, part in vae.named_modules() if isinstance(part, nn.Conv3d))


@contextmanager
def as_images(vae: nn.Module) -> Iterator[nn.Module]:
    """The stock VAE with exact 2-D arithmetic for single frames, (B, C, 1, H, W), for the `with` block.

    Other lengths raise ValueError. Calling `encoder` and `decoder` directly avoids the frame caches as well.
    """
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage as stock

    kinds = {
        stock.QwenImageCausalConv3d: _convolve,
        stock.QwenImageRMS_norm: _normalise,
        stock.QwenImageUpsample: _enlarge,
    }
    patched = [part for part in vae.modules() if type(part) in kinds]
    for part in patched:
        part.forward = partial(kinds[type(part)], part)
    try:
        yield vae
    finally:
        for part in patched:
            del part.forward


def _convolve(conv: nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if cache_x is not None or x.shape[2] != 1:
        raise ValueError(f"as_images takes single frames, this has {x.shape[2]}")
    left, right, top, bottom = conv._padding[:4]
    if (left, top) != (right, bottom):
        raise ValueError(f"as_images takes even padding, this is {conv._padding}")
    x = x.squeeze(2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left)).unsqueeze(2)


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    # stock code turns bf16 into fp32 at the scale, which doubles the memory that goes through every layer
    wide = F.normalize(x.float(), dim=1 if norm.channel_first else -1) * (norm.scale * norm.gamma)
    return (wide + norm.bias if isinstance(norm.bias, Tensor) else wide).to(x.dtype)


def _enlarge(upsample: nn.Module, x: Tensor) -> Tensor:
    # copies need no fp32, by way of which stock code goes
    return F.interpolate(x, scale_factor=upsample.scale_factor, mode=upsample.mode).to(x.dtype)
