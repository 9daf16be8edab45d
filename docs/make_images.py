"""Make the images that README and docs/ show, in assets/: examples 1, 6 and 3, and the report in Chromium.

Takes about six minutes on two CPU cores and needs Chromium. Every PNG keeps how it was made.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qwen_vision_bridge.cli import run
from qwen_vision_bridge.io import write_image

ROOT = Path(__file__).parents[1]
MOST = 300_000  # bytes an image
EXAMPLES = {"edit": ("1",), "attention": ("6",), "overview": ("3", "--cases", "12")}
SHEETS = {
    "edit": "comparison_basic.png",
    "attention": "attention_visualization.png",
    "overview": "spatial_tests/overview.png",
}
REPORT = "spatial_tests/report.html"
WINDOWS = {1280: 1000, 390: 844}  # px: a desktop and a phone
NARROWEST = 500  # px of a headless window; a narrower page goes into a frame


def main(argv: Sequence[str] | None = None) -> int:
    """Run the examples, photograph the report, and write small copies."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--assets", type=Path, default=ROOT / "assets", help="where the images go")
    options.add_argument("--keep", type=Path, help="folder of the examples' output; kept, and used again")
    arguments = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.keep or Path(temporary)
        for name, example in EXAMPLES.items():
            command = ["example_end_to_end.py", "--models", "miniature", "--output", str(output)]
            command += ["--example", *example]
            if not (output / SHEETS[name]).is_file():
                subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            shrink(output / SHEETS[name], arguments.assets / f"{name}.png", f"make_images.py: {name}")
        for width, height in WINDOWS.items():
            shot = photograph(output / REPORT, width, height)
            shrink(shot, arguments.assets / f"report-{width}.png", f"make_images.py: report at {width} px")
    return 0


def photograph(page: Path, width: int, height: int) -> Path:
    """The top of a page as Chromium shows it in a window of that size.

    Raises:
        FileNotFoundError: no Chromium.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise FileNotFoundError("the report's images need Chromium: apt-get install chromium")
    shot, frame = page.with_name(f"report-{width}.png"), page.with_name("frame.html")
    style = "margin:0;border:0;display:block"
    frame.write_text(
        f'<body style="{style}"><iframe src="{page.name}" width="{width}" height="{height}" style="{style}">'
    )
    window = f"--window-size={max(width, NARROWEST)},{height}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", window]
    command = [chromium, *flags, f"--screenshot={shot.resolve()}", frame.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as opened:
        opened.crop((0, 0, width, height)).save(shot)
    return shot


def shrink(source: Path, target: Path, command: str) -> None:
    """Write a copy of 256 colours, made smaller until it is small enough for a repository."""
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    while True:
        # The other methods give up a colour that covers little, which is that of a shape.
        small = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        write_image(target, small, {"command": command})
        size = target.stat().st_size
        print(f"{target}: {small.width}×{small.height} px, {size / 1000:.0f} kB")
        if size <= MOST:
            return
        image.thumbnail((image.width * 4 // 5, image.height * 4 // 5))


if __name__ == "__main__":
    run(main)
