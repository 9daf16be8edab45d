"""The log of a training run: a line on the screen, a JSON line on disk, a figure of both."""

from __future__ import annotations

import json
from pathlib import Path

LOG = "log.jsonl"
NOT_DRAWN = ("step", "lr", "it/s", "gpu", "seconds")


def write_row(folder: Path, row: dict[str, float], steps: int) -> None:
    """Print a row (`step`, scalars, `lr`, `it/s`, `seconds`; on CUDA `gpu`, GB) and append it to the log."""
    scalars = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in NOT_DRAWN)
    line = f"step {row['step']}/{steps}  {scalars}  lr {row['lr']:.2g}  {row['it/s']:.1f} it/s"
    print(line + (f"  gpu {row['gpu']:.1f} GB" if "gpu" in row else ""), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def plot_log(folder: Path) -> Path:
    """Draw every scalar of the log over the steps into loss.png.

    Raises:
        FileNotFoundError: the folder has no log.
    """
    from matplotlib.figure import Figure

    lines = (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}  # a resumed run repeats what it had not saved
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(name for row in rows.values() for name in row if name not in NOT_DRAWN):
        points = sorted((step, row[name]) for step, row in rows.items() if name in row)
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axis.set(yscale="log", xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(Path(folder) / "loss.png", dpi=110)
    return Path(folder) / "loss.png"
