"""Train the miniature's diffusion transformer on edits, with the frozen target as its text encoder.

    python -m recipes.miniature.train_dit --target runs/target/target --vae runs/vae/vae --folder runs/dit

Run it again to continue from the checkpoint; under `torchrun` all GPUs train and average their
weights. Latents and prompt states are computed once, when a pair is rendered, and kept on the device.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build as miniature
from . import peers
from .data import edit_pairs
from .editor import Editor, build_transformer, fast_transformer
from .fast import build
from .feed import Render
from .loop import Loop, plot_log
from .single_frame import as_images
from .stepper import compile_if_possible
from .supply import Supply, settings_of, stage_parser

SAVE_EVERY = 4000  # steps
DROPPED = 0.1  # share of empty prompts, for guidance
CHANGED = 4.0  # weight of a token that the edit changes, if it changes the USUAL share of all tokens;
USUAL = 0.15  # the fewer it changes, the more each weighs


def main() -> None:
    """Train and save."""
    arguments = _arguments()
    device = peers.device_of(arguments.device)
    with peers.together(device), Supply(arguments, partial(_make, arguments.writing)) as supply:
        editor = load(arguments.target, arguments.vae, arguments.start, arguments.seed).to(device)
        with as_images(editor.vae), fast_transformer():
            supply.start(partial(prepared, editor))
            trained = editor.transformer
            compute = partial(loss, editor)
            if arguments.compile:
                compile_if_possible(editor, compute, supply.layouts(), list(trained.parameters()))
            loop = Loop(
                arguments.folder,
                trained,
                compute,
                settings_of(arguments, arguments.seed),
                graphs=not arguments.no_graphs,
            )
            loop.resume()
            loop.run(supply.batch, lambda step, _row: loop.save() if step % SAVE_EVERY == 0 else None)
    if peers.rank() == 0:
        plot_log(arguments.folder)
        with loop.averaged():
            miniature.save_weights(
                _on_cpu(trained), Path(arguments.output or arguments.folder / "transformer")
            )


def _arguments() -> argparse.Namespace:
    parser = stage_parser(
        __doc__,
        steps=20_000,
        learning_rate=8e-4,
        weight_decay=0.02,
        workers=12,
        pool=500_000,
        two_every=8,
        seed=3,
    )
    parser.add_argument("--target", required=True, help="folder of the trained target")
    parser.add_argument("--vae", required=True, help="folder of the trained VAE")
    parser.add_argument(
        "--writing", type=float, default=0.2, help="how often a new word is asked for, beside all kinds"
    )
    return parser.parse_args()


def load(target: str, vae: str, transformer: str | None, seed: int) -> Editor:
    """The editor from its parts' folders, in fp32; a random transformer where none is given."""
    from diffusers import AutoencoderKLQwenImage

    return Editor(
        build("target", 0, target),
        AutoencoderKLQwenImage.from_pretrained(vae, torch_dtype=torch.float32),
        build_transformer(seed, transformer),
    )


def _on_cpu(model: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(model).cpu()


@torch.no_grad()
def prepared(editor: Editor, rows: dict[str, Any]) -> dict[str, Tensor]:
    """Pairs as latents and prompt states, in bf16 on the editor's device."""
    device = editor.latents_mean.device
    on = {name: torch.from_numpy(values).to(device) for name, values in rows.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        references = editor.references(on["full"])
        after = editor.to_latents(on["after"])
        states, empty = editor.embed(on["small"], on["text"].int())
    kept = {"references": references, "after": after, "states": states, "empty": empty}
    return {**{name: value.bfloat16() for name, value in kept.items()}, "length": on["length"]}


def _make(writing: float, shown: int) -> Render:
    return partial(edit_pairs, "train", shown=shown, writing=writing)


def loss(editor: Editor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flow matching (Lipman et al. 2023): velocity from image to noise, changed tokens counting more."""
    after, references = batch["after"].float(), batch["references"].float()
    count = len(after)
    device = after.device
    dropped = torch.rand(count, device=device) < DROPPED
    states, real = editor.conditions(batch["states"], batch["empty"], batch["length"], dropped)
    time = torch.sigmoid(0.4 + 1.2 * torch.randn(count, device=device))
    noise = torch.randn_like(after)
    noisy = torch.lerp(after, noise, time[:, None, None])
    predicted = editor.velocity(noisy, references, states, real, time).float()
    errors = (predicted - (noise - after)).square().mean(-1)  # (B, N)
    moved = (after - references[:, -after.shape[1] :]).abs().mean(-1) > 0.2
    few = (USUAL * moved.shape[1] / moved.sum(1, keepdim=True).clamp(min=1)).sqrt()  # (B, 1)
    weight = torch.where(moved, CHANGED * few, 1.0)
    weight = weight / weight.mean()
    return {
        "loss": (errors * weight).mean(),
        "changed": (errors * moved).sum() / moved.sum().clamp(min=1),
        "kept": (errors * ~moved).sum() / (~moved).sum().clamp(min=1),
    }


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"{time.time() - started:.0f} s in all")
