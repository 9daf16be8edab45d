"""Train the miniature's diffusion transformer on edits, with the frozen target as its text encoder.

    python recipes/miniature/train_dit.py --target runs/target/target --vae runs/vae/vae --folder runs/dit

Run it again to go on from the last checkpoint. Latents and prompt states are worked out once, when a pair is
rendered, and kept on the device.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import edit_pairs
from editor import Editor, build_transformer, padded_prompts
from fast import build
from feed import Feed, Pool
from loop import Loop, Settings, plot_log
from single_frame import as_images
from stepper import compiled
from torch import Tensor

from qwen_vision_bridge import miniature

DROPPED = 0.1  # of the prompts, for guidance
CHANGED = 3.0  # how much more a token counts that the edit changes


def main() -> None:
    """Train and save."""
    arguments = _arguments()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = Settings(
        steps=arguments.steps, learning_rate=arguments.learning_rate, minutes=arguments.minutes,
        cosine_minutes=arguments.cosine_minutes,
        seed=arguments.seed, log_every=arguments.log_every, weight_decay=arguments.weight_decay,
    )  # fmt: skip
    with Supply(arguments) as supply:
        editor = load(arguments.target, arguments.vae, arguments.start, arguments.seed).to(device)
        with as_images(editor.vae), padded_prompts():
            supply.start(editor, device)
            trained = editor.transformer
            compute = partial(loss, editor)
            if arguments.compile:
                compute = compiled(compute, supply.batch(0), trained)
            loop = Loop(arguments.folder, trained, compute, settings, graphs=not arguments.no_graphs)
            loop.resume()
            loop.run(supply.batch, None)
        loop.save()
    plot_log(arguments.folder)
    with loop.averaged():
        miniature.save_weights(_on_cpu(trained), Path(arguments.output or arguments.folder / "transformer"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder of the trained target")
    parser.add_argument("--vae", required=True, help="folder of the trained VAE")
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, log and results")
    parser.add_argument("--output", type=Path, help="the finished transformer in stock layout")
    parser.add_argument("--start", help="a stock folder to start from instead of random weights")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--cosine-minutes", type=float, help="let the rate fall with time, not with steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--pool", type=int, default=500_000, help="pairs kept on the device")
    parser.add_argument("--first", type=int, default=0, help="index of the first pair to render")
    parser.add_argument("--two-every", type=int, default=8, help="every so many steps has two pictures")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the loss: a minute, then faster"
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


class Supply:
    """Pairs on the device as latents and prompt states, filled up while training runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        chunk = min(1024, arguments.pool)
        self.sizes = {1: arguments.pool, 2: max(arguments.pool // 8, chunk)}
        share = {1: max(arguments.workers - arguments.workers // 6, 1), 2: max(arguments.workers // 6, 1)}
        self.feeds = {
            shown: Feed(partial(_make, shown), chunk, share[shown], first=arguments.first) for shown in (1, 2)
        }
        self.pools: dict[int, Pool] = {}

    def __enter__(self) -> Supply:
        for feed in self.feeds.values():
            feed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for feed in self.feeds.values():
            feed.__exit__(*error)

    def start(self, editor: Editor, device: torch.device) -> None:
        """Wait for the first pairs."""
        self.editor, self.device = editor, device
        for shown, feed in self.feeds.items():
            self.pools[shown] = Pool(self.sizes[shown], device)
            least = min(self.sizes[shown], 8192 if shown == 1 else 2048)
            while self.pools[shown].filled < least:
                self.pools[shown].add(self._prepared(feed.poll(block=True)[1]))

    def _prepared(self, rows: dict[str, Any]) -> dict[str, Tensor]:
        on = {name: torch.from_numpy(values).to(self.device) for name, values in rows.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            count, shown = on["full"].shape[:2]
            references = self.editor.to_latents(on["full"].flatten(0, 1)).reshape(count, shown * 64, -1)
            after = self.editor.to_latents(on["after"])
            states, empty = self.editor.embed(on["small"], on["text"].int())
        kept = {"references": references, "after": after, "states": states, "empty": empty}
        return {**{name: value.bfloat16() for name, value in kept.items()}, "length": on["length"]}

    def batch(self, step: int) -> dict[str, Tensor]:
        """A random batch; now and then new pairs are taken in first."""
        if step % 4 == 0:
            for shown, feed in self.feeds.items():
                if (chunk := feed.poll()) is not None:
                    self.pools[shown].add(self._prepared(chunk[1]))
        every = self.arguments.two_every
        shown = 2 if every and step % every == every - 1 else 1
        pool = self.pools[shown]
        return pool.gather(torch.randint(pool.filled, (self.arguments.batch,), device=self.device))


def _make(shown: int, first: int, count: int) -> dict[str, Any]:
    return edit_pairs("train", first, count, shown)


def loss(editor: Editor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flow matching (Lipman et al. 2023): velocity from picture to noise, changed tokens counting more."""
    after, references = batch["after"].float(), batch["references"].float()
    count = len(after)
    device = after.device
    dropped = torch.rand(count, device=device) < DROPPED
    states, real = editor.conditions(batch["states"], batch["empty"], batch["length"], dropped)
    time = torch.sigmoid(0.4 + 1.2 * torch.randn(count, device=device))
    noise = torch.randn_like(after)
    noisy = torch.lerp(after, noise, time[:, None, None])
    predicted = editor.velocity(noisy, references, states, real, time).float()
    errors = (predicted - (noise - after)).square().mean(-1)  # (B, 64)
    moved = (after - references[:, -after.shape[1] :]).abs().mean(-1) > 0.2
    weight = 1 + (CHANGED - 1) * moved.float()
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
