"""Text of a trained bridge's card: how it was trained, and its figures beside the baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..io import without_folders

BASELINE = "baseline/"
"""Before a figure's name: the same figure without a bridge."""
WORDS = {
    "letters": "letters at their right place",
    "words": "words right in every letter",
    "loss": "cross-entropy of the answers (lower is better)",
    "right": "tokens of the answers predicted right",
    "edit": "flow-matching loss of the edits (lower is better)",
    "gate": "gate",
}


def card_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The parts `training` and `results` of a card, as `VisionBridge.generate_model_card` takes them.

    Args:
        summary: what `training.json` holds.
    """
    return {"training": without_folders(_training(summary)), "results": _results(summary)}


def _training(summary: Mapping[str, Any]) -> str:
    settings, samples = summary["settings"], summary["samples"]
    learned = " and ".join(f"{count} samples of the kind `{kind}`" for kind, count in samples.items())
    models = " to ".join(f"{summary[role]} (`{summary['repos'][role]}`)" for role in ("source", "target"))
    lines = [f"From {models}, family `{summary['family']}`, with the method `{summary['method']}`: {learned}"]
    if summary["steps"]:
        batch = settings["train_batch_size"] * settings["gradient_accumulation_steps"]
        lines[0] += f", {summary['steps']} steps of {batch}, learning rate {settings['learning_rate']:g}"
    else:
        lines[0] += ", in closed form"
    lines[0] += f", seed {settings['seed']}."
    if summary["features"] != "own":
        lines.append(f"A control: it sees `{summary['features']}` features in place of the source's own.")
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines.append(f"Made on {summary['device']}, {summary['date'][:10]}, by")
    lines.append(f"    {summary['command']}")
    lines.append(f"with {versions}.")
    return "\n\n".join(lines)


def _results(summary: Mapping[str, Any]) -> str:
    """A table of the last validation, on held-out samples."""
    baseline, counts = summary["baseline"], summary["held_out"]
    held_out = " and ".join(f"{count} of the kind `{kind}`" for kind, count in counts.items())
    rows = [
        f"On held-out samples ({held_out}), one seed, no interval:",
        "",
        "| figure | baseline | with the bridge |",
        "| --- | --- | --- |",
    ]
    for name, value in summary["validation"].items():
        words = WORDS.get(name, f"questions answered right: {name.removeprefix('answered/')}")
        before = f"{baseline[name]:.4f}" if name in baseline else ""
        rows.append(f"| {words} | {before} | {value:.4f} |")
    return "\n".join(rows)


def beside_baseline(figures: Mapping[str, float]) -> str:
    """Figures in a line, each with the baseline's in brackets where it is known."""
    parts = []
    for name, value in figures.items():
        if BASELINE in name:
            continue
        group, slash, figure = name.partition("/")
        before = figures.get(f"{group}/{BASELINE}{figure}") if slash else None
        parts.append(f"{name} {value:.4g}" + ("" if before is None else f" (baseline {before:.4g})"))
    return "  ".join(parts)
