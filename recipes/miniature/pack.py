"""Put the trained parts together as the package ships them, and check their sizes.

    python -m recipes.miniature.pack --source runs/source/source --target runs/target/target \\
        --vae runs/vae/vae --transformer runs/dit/transformer
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from qwen_vision_bridge.loading.checkpoints import SHIPPED

from . import build as miniature

MOST, MOST_IN_FILE = 40e6, 15e6  # bytes


def main() -> None:
    """Copy, complete and check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("source", "target", "vae", "transformer"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of the trained {name}")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    root = arguments.output
    for place in ("source", "editor"):
        shutil.rmtree(root / place, ignore_errors=True)
    shutil.copytree(arguments.source, root / "source")
    for name, folder in (
        ("text_encoder", arguments.target),
        ("vae", arguments.vae),
        ("transformer", arguments.transformer),
    ):
        shutil.copytree(folder, root / "editor" / name, ignore=_not_weights)
    miniature.build(root, "editor")  # adds processor, tokenizer, scheduler and index
    check(root)


def _not_weights(_folder: str, names: list[str]) -> list[str]:
    """The pipeline keeps processor and tokenizer in folders of their own."""
    return [
        name for name in names if not name.startswith(("config", "generation_config", "model", "diffusion"))
    ]


def check(root: Path) -> None:
    """Sizes, as the package may ship them.

    Raises:
        ValueError: too large.
    """
    sizes = {path: path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size / 1e6:7.2f} MB  {path.relative_to(root)}")
        if size >= MOST_IN_FILE:
            raise ValueError(f"{path} has {size / 1e6:.1f} MB; needed: less than {MOST_IN_FILE / 1e6:.0f}")
    total = sum(sizes.values())
    print(f"{total / 1e6:7.2f} MB  in all")
    if total > MOST:
        raise ValueError(f"{root} has {total / 1e6:.1f} MB; needed: at most {MOST / 1e6:.0f}")


if __name__ == "__main__":
    main()
