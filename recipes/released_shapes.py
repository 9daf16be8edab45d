"""Write checkpoints at the released models' true shapes with random weights, in the hub's layout.

python recipes/released_shapes.py Qwen3-VL-8B /dev/shm/qwen3-vl-8b
python recipes/released_shapes.py Qwen-Image-Edit-2509 /dev/shm/editor
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.random_checkpoints import CONFIGS, EDITOR, write_checkpoint, write_editor


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[*sorted(CONFIGS), EDITOR])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="language layers, to rehearse with less")
    parser.add_argument("--dit-layers", type=int, help="layers of the transformer, to rehearse with less")
    parser.add_argument("--tiny", action="store_true", help="an eighth of the widths, to rehearse")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.model == EDITOR:
        total = write_editor(given.folder, given.layers, given.dit_layers, given.seed, given.tiny)
    else:
        total = write_checkpoint(given.model, given.folder, given.layers, given.seed, given.tiny)
    print(f"{given.model}: {total / 1e9:.2f} GB in {given.folder}")


if __name__ == "__main__":
    main()
