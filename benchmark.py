"""Time and memory of baseline and enhanced edits and of every stage, side by side in one run.

Parts that are finished on this device are skipped; every result is written to `results.json` at once.

    python benchmark.py --family qwen --random-weights --minutes 9     # released shapes, no download
    python benchmark.py --family miniature
    python benchmark.py --source FOLDER --target FOLDER --editor FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen_vision_bridge.cli import run

LAYOUT = argparse.RawDescriptionHelpFormatter
FOLDER = Path("/dev/shm/qwen-vision-bridge")
RANDOM = "write random checkpoints in the released layout where they are missing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected parts, in order of value; 1 where one failed."""
    arguments = parser().parse_args(argv)
    from benchmarks.parts import run_parts

    return run_parts(arguments)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=LAYOUT)
    command.add_argument("--family", default="miniature", choices=["miniature", "qwen"])
    command.add_argument("--random-weights", action="store_true", help=RANDOM)
    command.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints and images lie")
    command.add_argument("--tiny", action="store_true", help="an eighth of the released widths, to rehearse")
    command.add_argument("--source", help="your own Qwen3-VL: registered name, hub id or folder")
    command.add_argument("--target", help="your own Qwen2.5-VL")
    command.add_argument("--editor", help="your own Qwen-Image-Edit")
    command.add_argument("--parts", help="which parts, by commas; default: all")
    command.add_argument("--side", type=int, default=1024, help="px of the edited image's side")
    command.add_argument("--steps", type=int, help="denoising steps of a whole edit; default: the family's")
    command.add_argument("--repeats", type=int, default=3, help="whole edits an arm")
    command.add_argument(
        "--pictures", dest="images", type=int, default=1024, help="files of the image folder"
    )
    command.add_argument("--cases", type=int, default=40, help="cases of the evaluation on several devices")
    command.add_argument("--minutes", type=float, help="skip parts that do not fit this budget")
    command.add_argument("--output", type=Path, default=Path("benchmarks"))
    command.add_argument("--again", action="store_true", help="repeat finished parts")
    command.add_argument("--device", help="default: CUDA where there is one, else the CPU")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


if __name__ == "__main__":
    run(main)
