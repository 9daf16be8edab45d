"""Distil the miniature's editor into a LoRA that edits in a few steps without guidance.

    python -m recipes.miniature.train_few_steps --folder runs/few --output runs/few-steps-4.safetensors

The student unrolls all its steps, and its last image is compared with the teacher's from the same noise: 20
steps with guidance, as the stock pipeline takes them. Run it again to continue from the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import deque
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_vision_bridge.io import write_whole
from qwen_vision_bridge.loading.editors import few_step_scheduler
from qwen_vision_bridge.loading.registry import FAMILIES

from .editor import Editor
from .feed import Batches, alternating
from .flags import add_prompt_flags, stage_parser
from .loop import Loop, Settings, plot_log, start
from .train_dit import _make, load, weighted

LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "net.0.proj",
    "net.2",
    "img_mod.1",
    "txt_mod.1",
)
SAVE_EVERY = 200  # steps
TEACHER_EVERY = 3  # steps of the student to one batch of the teacher
KEPT = 40  # the teacher's batches, drawn at random


def main() -> None:
    """Train and save."""
    arguments = _arguments()
    accelerator = start(arguments.device)
    editor = load(arguments.target, arguments.vae, arguments.start, arguments.seed).to(accelerator.device)
    teacher = copy.deepcopy(editor.transformer).eval().requires_grad_(False)
    add_lora(editor.transformer, arguments.rank)
    sigmas = sigmas_of(few_step_scheduler(), arguments.few)
    settings = Settings.from_flags(arguments, arguments.seed)
    student = partial(loss, editor, sigmas.to(accelerator.device))
    loop = Loop(arguments.folder, editor.transformer, student, settings, accelerator)
    loop.resume()
    batches = alternating(partial(_make, arguments.writing), arguments, accelerator)
    answered = distilled(batches, editor, teacher)
    loop.run(answered, lambda step: loop.save() if step % SAVE_EVERY == 0 else None)
    if accelerator.is_main_process:
        plot_log(arguments.folder)
        with loop.averaged():
            save_lora(editor.transformer, arguments.rank, arguments.output)


def _arguments() -> argparse.Namespace:
    from qwen_vision_bridge.loading.checkpoints import locate

    shipped = locate("builtin:editor")
    parser = stage_parser(__doc__, steps=1_500, learning_rate=2e-3, workers=12, seed=5, batch=192)
    add_prompt_flags(parser)
    parser.set_defaults(
        weight_decay=0.0, two_every=8, log_every=20, pool=20_000, start=f"{shipped}/transformer"
    )
    parser.add_argument("--target", default=f"{shipped}/text_encoder", help="folder of the target")
    parser.add_argument("--vae", default=f"{shipped}/vae", help="folder of the VAE")
    parser.add_argument("--writing", type=float, default=0.2, help="share of prompts for a new word")
    parser.add_argument("--few", type=int, default=4, help="steps of the student")
    parser.add_argument("--rank", type=int, default=20)
    return parser.parse_args()


def add_lora(transformer: nn.Module, rank: int) -> None:
    """A fresh LoRA on every matrix of the blocks, in fp32; the rest is frozen."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))


def save_lora(transformer: nn.Module, rank: int, path: Path) -> None:
    """Write the LoRA in bf16, in diffusers' layout."""
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(transformer, adapter_name="default")
    kept = {f"transformer.{key}": value.to(torch.bfloat16).cpu() for key, value in tensors.items()}
    write_whole(path, lambda file: save_file(kept, file))
    print(f"{path}: rank {rank}, {path.stat().st_size / 1e6:.2f} MB")


def sigmas_of(scheduler: object, steps: int) -> Tensor:
    """A scheduler's noise levels for images of 128² px, as the stock pipeline asks for them."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

    config = scheduler.config  # type: ignore[attr-defined]
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(256, *(config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # type: ignore[attr-defined]
    return scheduler.sigmas  # type: ignore[attr-defined]


def distilled(batches: Batches, editor: Editor, teacher: nn.Module) -> Batches:
    """Batches with the teacher's images, most of them drawn again from those kept."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from qwen_vision_bridge.loading.checkpoints import locate

    kept: deque[dict[str, Tensor]] = deque(maxlen=KEPT)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(locate("builtin:editor"), subfolder="scheduler")
    family = FAMILIES["miniature"]
    sigmas, scale = sigmas_of(stock, family.steps), family.true_cfg_scale
    rng = np.random.default_rng(0)

    def next_batch(step: int) -> dict[str, Tensor]:
        if step % TEACHER_EVERY == 0 or not kept:
            kept.append(answer(editor, teacher, batches(step // TEACHER_EVERY), sigmas, scale))
        return kept[int(rng.integers(len(kept)))]

    return next_batch


@torch.no_grad()
def answer(
    editor: Editor, teacher: nn.Module, batch: dict[str, Tensor], sigmas: Tensor, scale: float
) -> dict[str, Tensor]:
    """What the student reads of a batch of `edit_pairs`, and what the teacher makes of it.

    Returns:
        `noise`, `drawn` (B, 256, 32), `references` (B, shown·256, 32), `states` (B, T, D), `real` (B, T).
    """
    device = batch["full"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        references = editor.references(batch["full"])
        states, empty = editor.embed(batch["small"], batch["text"])
        count = len(states)
        every = torch.ones(count, dtype=torch.bool, device=device)
        asked = editor.conditions(states, empty, batch["length"], ~every)
        unasked = editor.conditions(states, empty, batch["length"], every)
        noise = torch.randn_like(references[:, :256].float())
        latents = noise
        for now, following in pairwise(sigmas):
            time = now.to(device).expand(count)
            wanted = editor.velocity(latents, references, *asked, time, teacher).float()
            stock = editor.velocity(latents, references, *unasked, time, teacher).float()
            guided = stock + scale * (wanted - stock)
            guided = guided * wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            latents = latents + (following - now).to(device) * guided
    return {
        "noise": noise,
        "drawn": latents,
        "references": references.float(),
        "states": asked[0].float(),
        "real": asked[1],
    }


def loss(editor: Editor, sigmas: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squared error of the student's last image, what the edit changes counting more."""
    latents, references = batch["noise"], batch["references"]
    count = len(latents)
    for now, following in pairwise(sigmas):
        velocity = editor.velocity(latents, references, batch["states"], batch["real"], now.expand(count))
        latents = latents + (following - now) * velocity.float()
    return weighted(latents - batch["drawn"], batch["drawn"], references)


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"{time.time() - started:.0f} s in all")
