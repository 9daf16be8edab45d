"""Train the miniature's diffusion transformer on edits, with the frozen target as its text encoder.

    python -m recipes.miniature.train_dit --target runs/target/target --vae runs/vae/vae --folder runs/dit

Run it again to continue from the checkpoint; `accelerate launch` or `torchrun` trains on several GPUs.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import build as miniature
from .data import edit_pairs
from .editor import Editor
from .feed import Render, alternating
from .flags import add_prompt_flags, stage_parser
from .loop import Loop, Settings, plot_log, start
from .models import build_reader, build_transformer, build_vae

SAVE_EVERY = 4000  # steps
DROPPED = 0.1  # share of empty prompts, for guidance
CHANGED = 4.0  # weight of a token that the edit changes, if it changes the USUAL share of all tokens;
USUAL = 0.15  # the fewer it changes, the more each weighs


def main() -> None:
    """Train and save."""
    arguments = _arguments()
    accelerator = start(arguments.device)
    editor = load(arguments.target, arguments.vae, arguments.start, arguments.seed).to(accelerator.device)
    if arguments.compile:
        editor.transformer.compile_repeated_blocks()
    settings = Settings.from_flags(arguments, arguments.seed)
    loop = Loop(arguments.folder, editor.transformer, partial(loss, editor), settings, accelerator)
    loop.resume()
    batches = alternating(partial(_make, arguments.writing), arguments, accelerator)
    loop.run(batches, lambda step: loop.save() if step % SAVE_EVERY == 0 else None)
    if accelerator.is_main_process:
        plot_log(arguments.folder)
        with loop.averaged():
            finished = copy.deepcopy(editor.transformer).cpu()
        miniature.save_weights(finished, Path(arguments.output or arguments.folder / "transformer"))


def _arguments() -> argparse.Namespace:
    parser = stage_parser(__doc__, steps=20_000, learning_rate=8e-4, workers=12, seed=3)
    add_prompt_flags(parser)
    parser.set_defaults(weight_decay=0.02, two_every=8)
    parser.add_argument("--target", required=True, help="folder of the trained target")
    parser.add_argument("--vae", required=True, help="folder of the trained VAE")
    parser.add_argument(
        "--writing", type=float, default=0.2, help="how often a new word is asked for, beside all kinds"
    )
    return parser.parse_args()


def load(target: str, vae: str, transformer: str | None, seed: int) -> Editor:
    """The editor from its parts' folders, in fp32; a random transformer where none is given."""
    return Editor(build_reader("target", 0, target), build_vae(0, vae), build_transformer(seed, transformer))


def _make(writing: float, shown: int) -> Render:
    return partial(edit_pairs, "train", shown=shown, writing=writing)


def loss(editor: Editor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flow matching (Lipman et al. 2023): velocity from image to noise, changed tokens counting more.

    Args:
        batch: what `edit_pairs` renders.
    """
    references, after = editor.references(batch["full"]), editor.to_latents(batch["after"])
    states, empty = editor.embed(batch["small"], batch["text"])
    count = len(after)
    device = after.device
    dropped = torch.rand(count, device=device) < DROPPED
    states, real = editor.conditions(states, empty, batch["length"], dropped)
    time = torch.sigmoid(0.4 + 1.2 * torch.randn(count, device=device))
    noise = torch.randn_like(after)
    noisy = torch.lerp(after, noise, time[:, None, None])
    predicted = editor.velocity(noisy, references, states, real, time).float()
    return weighted(predicted - (noise - after), after, references)


def weighted(difference: Tensor, after: Tensor, references: Tensor) -> dict[str, Tensor]:
    """Squared error over the tokens of an edit, those that it changes counting more.

    Args:
        difference: (B, N, C). after: latents of the edited image (B, N, C). references: (B, shown·N, C).
    """
    errors = difference.square().mean(-1)  # (B, N)
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
