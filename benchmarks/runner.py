"""One benchmark run: its settings, its models, and rows that are on disk after each measurement."""

from __future__ import annotations

import json
import logging
import math
import operator
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qwen_vision_bridge.io import digest_of, write_json
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.specs import Family

from .timing import Measured, summarise

logger = logging.getLogger(__name__)

SIGNS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
PIPELINE_SIDE = 1024  # px, what diffusers' pipelines take unless told otherwise


@dataclass(frozen=True)
class Settings:
    """What is measured, and how much of it; a part is repeated under other settings."""

    family: str = "miniature"
    random_weights: bool = False
    """Write checkpoints with random weights in the released layout, where they are missing."""
    folder: Path = Path("/dev/shm/qwen-vision-bridge")
    """Where those checkpoints lie."""
    source: str | None = None
    target: str | None = None
    editor: str | None = None
    tiny: bool = False
    """An eighth of the released widths, to rehearse."""
    side: int = PIPELINE_SIDE
    """px of the edited image's side."""
    steps: int | None = None
    """Denoising steps of a whole edit; None is the family's."""
    repeats: int = 3
    """Whole edits an arm; single stages are measured more often."""
    images: int = 1024
    """Images of the folder for streams."""
    cases: int = 40
    """Synthetic cases of the evaluation that is shared between devices."""


@dataclass
class Bench:
    """One run: adds rows to `results.json` and keeps the time budget."""

    settings: Settings
    output: Path
    device: torch.device
    minutes: float = math.inf
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        path = self.output / "results.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else []
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def device_name(self) -> str:
        """The device's name in every row."""
        return device_name(self.device)

    @property
    def released(self) -> bool:
        """Whether the shapes are the released models', to which the bars apply."""
        return self.settings.family == "qwen" and not self.settings.tiny

    @property
    def cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds of the time budget that are left."""
        return self.minutes * 60 - self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    def add(
        self,
        name: str,
        value: float | Measured | Sequence[float],
        unit: str,
        bar: str = "",
        scale: float = 1.0,
    ) -> float:
        """Record a number; it replaces one of the same name and device.

        Args:
            value: one number, repeated measurements, or their summary.
            bar: what it must reach, such as `<= 1.01`.
            scale: multiplies the value into its unit.

        Returns:
            The recorded value.
        """
        if not isinstance(value, Measured):
            value = summarise([value] if isinstance(value, int | float) else value)
        median, spread = value.median * scale, value.spread * scale
        if not math.isfinite(median):
            return median  # nothing to record: memory on a CPU
        row = {
            "name": name,
            "value": float(f"{median:.6g}"),
            "unit": unit,
            "bar": bar,
            "spread": float(f"{spread:.3g}"),
            "n": value.n,
            "device": self.device_name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kept = [other for other in self.rows if (other["name"], other["device"]) != (name, row["device"])]
        self.rows = [*kept, row]
        write_json(self.output / "results.json", self.rows)
        print(line(row), flush=True)
        return median

    def value_of(self, name: str) -> float | None:
        """The value recorded under this name on this device, or None."""
        rows = (row for row in self.rows if (row["name"], row["device"]) == (name, self.device_name))
        return next((row["value"] for row in rows), None)

    def is_done(self, part: str) -> bool:
        """Whether a part was finished on this device under these settings."""
        return self._marks().get(f"{part}, {self.device_name}") == self._key()

    def mark_done(self, part: str) -> None:
        """Record that a part is finished."""
        write_json(self.output / "parts.json", {**self._marks(), f"{part}, {self.device_name}": self._key()})

    def load_family(self, editor: bool = False, whole: bool = False) -> Family:
        """Resolve the models; with random weights, write those that are needed first.

        Args:
            editor: whether the whole editor is needed, not only the two towers.
            whole: whether the source's language model is needed too.
        """
        settings = self.settings
        roles = self._write(editor, whole) if settings.random_weights else {}
        for role in ("source", "target", "editor"):
            if (location := getattr(settings, role)) is not None:
                roles[role] = location
        family = resolve_family(settings.family, **roles)
        if settings.side != PIPELINE_SIDE:
            family = replace(family, editor=replace(family.editor, vae_area=settings.side**2))
        return family

    def _write(self, editor: bool, whole: bool) -> dict[str, str]:
        from .random_checkpoints import drop_language_shards, is_complete, write_checkpoint, write_editor

        source, pipeline = self.settings.folder / "source", self.settings.folder / "editor"
        target, tiny = pipeline / "text_encoder", self.settings.tiny
        self._claim_weights(source, pipeline)

        def report(name: str, write: Callable[[], int]) -> None:
            started = time.perf_counter()
            size = write()
            print(f"{name}: {size / 1e9:.1f} GB written in {time.perf_counter() - started:.0f} s", flush=True)

        if not is_complete(source, towers_only=not whole):
            report("Qwen3-VL-8B", lambda: write_checkpoint("Qwen3-VL-8B", source, tiny=tiny))
        if not is_complete(target):
            report("Qwen2.5-VL-7B", lambda: write_checkpoint("Qwen2.5-VL-7B", target, tiny=tiny))
        roles = {"source": str(source), "target": str(target)}
        if editor:
            if not (pipeline / "model_index.json").is_file():
                drop_language_shards(source)  # everything together exceeds the default size of /dev/shm
                report("Qwen-Image-Edit-2509", lambda: write_editor(pipeline, tiny=tiny))
            roles["editor"] = str(pipeline)
        return roles

    def _claim_weights(self, *folders: Path) -> None:
        """Mark the folder's checkpoints as this benchmark's before one is written, used or thinned out.

        Raises:
            FileExistsError: the folder holds checkpoints without that mark.
        """
        mark = self.settings.folder / "random-weights.json"
        if mark.is_file():
            return
        for folder in filter(Path.exists, folders):
            raise FileExistsError(f"{folder} is not this benchmark's: move it away, or give another --folder")
        write_json(mark, {"format": "qwen-vision-bridge/random-weights/1"})

    def _marks(self) -> dict[str, str]:
        path = self.output / "parts.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _key(self) -> str:
        return digest_of(asdict(self.settings))


def meets(row: dict[str, Any]) -> bool | None:
    """Whether a row meets its bar; None where it has none."""
    if not row["bar"]:
        return None
    sign, limit = row["bar"].split()
    return SIGNS[sign](row["value"], float(limit))


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    spread = f" ± {row['spread']:.3g}" if row["n"] > 1 else ""
    verdict = {None: "", True: f"  {row['bar']}: met", False: f"  {row['bar']}: NOT MET"}[meets(row)]
    return f"{row['name']:72} {row['value']:>12.6g} {row['unit']}{spread} (n={row['n']}){verdict}"


def table(rows: Sequence[dict[str, Any]], barred: bool = False) -> str:
    """The rows as lines by device; `barred` leaves out rows without a bar."""
    lines: list[str] = []
    for device in dict.fromkeys(row["device"] for row in rows):
        chosen = [row for row in rows if row["device"] == device and (row["bar"] or not barred)]
        if chosen:
            lines += [f"== {device} ==", *map(line, chosen)]
    return "\n".join(lines)
