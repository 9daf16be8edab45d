"""Time and memory of baseline and enhanced edits and of every stage, side by side in one run.

Parts that were finished on this device are not done again; what is measured is in `results.json` at once.

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
RANDOM = "write random checkpoints in the released layout where there are none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, in order of value; 1 where one failed."""
    arguments = parser().parse_args(argv)
    from benchmarks.parts import run_parts

    return run_parts(arguments)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=LAYOUT)
    made.add_argument("--family", default="miniature", choices=["miniature", "qwen"])
    made.add_argument("--random-weights", action="store_true", help=RANDOM)
    made.add_argument("--folder", type=Path, default=FOLDER, help="where they lie")
    made.add_argument("--tiny", action="store_true", help="an eighth of the released widths, to rehearse")
    made.add_argument("--source", help="your own Qwen3-VL: registered name, hub id or folder")
    made.add_argument("--target", help="your own Qwen2.5-VL")
    made.add_argument("--editor", help="your own Qwen-Image-Edit")
    made.add_argument("--parts", help="which parts, by commas; default: all that this machine can do")
    made.add_argument("--side", type=int, default=1024, help="px of the edited image's side")
    made.add_argument("--steps", type=int, help="denoising steps of a whole edit; default: the family's")
    made.add_argument("--repeats", type=int, default=3, help="whole edits an arm")
    made.add_argument(
        "--pictures", dest="images", type=int, default=1024, help="files of the folder that is streamed"
    )
    made.add_argument("--cases", type=int, default=40, help="cases of the evaluation that devices share")
    made.add_argument("--minutes", type=float, help="begin no part that this time does not do for")
    made.add_argument("--output", type=Path, default=Path("benchmarks"))
    made.add_argument("--again", action="store_true", help="do finished parts again")
    made.add_argument("--device", help="default: CUDA where there is one, else the CPU")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


if __name__ == "__main__":
    run(main)
