"""Train the arms, ask and edit through them on held-out cases, and write results.json, a table and figures.

    python recipes/experiment/run.py choose --folder runs/experiment     # designs, on the validation split
    python recipes/experiment/run.py final --folder runs/experiment      # the arms, on the test split, once
    python recipes/experiment/run.py curves --folder runs/experiment     # strength, rank, amount of data

Each part goes on where it was stopped. `--tiny` rehearses everything on a CPU in minutes; its figures prove
nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import Bench
from designs import AMOUNTS, ARMS, DESIGNS, EXTRA, RANKS, STRENGTHS, Design

from qwen_vision_bridge.records import provenance, write_json, write_whole
from qwen_vision_bridge.settings import TrainingSettings
from qwen_vision_bridge.world import GROUPS

TINY = {"samples": 24, "cases": 6, "edits": 2, "steps": 2, "batch": 2, "seeds": [0], "edit_steps": 2}


def main(given: Sequence[str] | None = None) -> None:
    """Run one part of the experiment."""
    arguments = _arguments(given)
    bench = Bench(arguments.folder, arguments.samples, arguments.workers, arguments.packs)
    {"train": train, "choose": choose, "final": final, "curves": curves}[arguments.part](bench, arguments)


def train(bench: Bench, arguments: argparse.Namespace) -> None:
    """The arms, or some of them, alone: several processes may share a folder that has its packs."""
    _trained(bench, [EXTRA[name] for name in arguments.designs] if arguments.designs else ARMS, arguments)


def choose(bench: Bench, arguments: argparse.Namespace) -> None:
    """All designs on the validation split, by perception."""
    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else DESIGNS
    found = _trained(bench, designs, arguments)
    rows = _perceived(bench, found, arguments, "validation")
    _write(arguments, "choose", rows)


def final(bench: Bench, arguments: argparse.Namespace) -> None:
    """All arms on the test split, and on words and pairs that no training has shown."""
    from editing import edit_all
    from results import CONTROLS, draw_differences, level_shares, rows_of

    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else ARMS
    found = _trained(bench, designs, arguments)
    rows = [
        {**row, "split": split}
        for split in arguments.splits
        for row in _perceived(bench, found, arguments, split)
    ]
    if arguments.edits:
        some = [one for one in found if one[1] in arguments.seeds[: arguments.edit_seeds]]
        records = edit_all(
            bench,
            some,
            arguments.folder / "edits",
            arguments.edits,
            arguments.edit_steps,
            arguments.batch_arms,
        )
        write_json(arguments.folder / "levels.json", level_shares(records))
        for against in ("baseline", *CONTROLS):
            rows += [{**row, "split": "test"} for row in rows_of(records, "edit", against)]
    _write(arguments, "final", rows)
    against_baseline = [row for row in rows if row["against"] == "baseline" and row["split"] == "test"]
    for gain, metric in (("perception", "letters"), ("perception", "answered"), ("edit", "right")):
        draw_differences(against_baseline, arguments.folder / f"{gain}-{metric}.png", gain, metric)


def curves(bench: Bench, arguments: argparse.Namespace) -> None:
    """Letters read on the validation split by strength, by rank and by the amount of data."""
    from asking import ask_all, ask_at
    from results import draw_curve, rows_of

    log = arguments.folder / "asked-validation.jsonl"
    baseline = [r for r in ask_all(bench, [], "validation", arguments.cases, log) if r["arm"] == "baseline"]
    curve_rows = []
    found = _trained(bench, [EXTRA["perceive"]], arguments)
    points = []
    for strength in STRENGTHS:
        records = [
            r for d, s, f in found for r in ask_at(bench, d, s, f, strength, "validation", arguments.cases)
        ]
        row = _letters(rows_of([*baseline, *records], "perception"))
        points.append((strength, row["diff"], row["ci_low"], row["ci_high"]))
        curve_rows.append({**row, "strength": strength})
    draw_curve(points, arguments.folder / "strength.png", "strength")
    for name, designs in (("rank", RANKS), ("lessons", AMOUNTS)):
        found = _trained(bench, designs, arguments)
        records = ask_all(bench, found, "validation", arguments.cases, log)
        rows = [_letters([r for r in rows_of(records, "perception") if r["arm"] == d.name]) for d in designs]
        sizes = [float("".join(filter(str.isdigit, row["arm"]))) for row in rows]
        draw_curve(
            [(x, r["diff"], r["ci_low"], r["ci_high"]) for x, r in zip(sizes, rows, strict=True)],
            arguments.folder / f"{name}.png", name,
        )  # fmt: skip
        curve_rows += rows
    _write(arguments, "curves", curve_rows)


def _trained(
    bench: Bench, designs: Sequence[Design], arguments: argparse.Namespace
) -> list[tuple[Design, int, Path]]:
    settings = TrainingSettings(
        max_train_steps=arguments.steps, train_batch_size=arguments.batch,
        checkpointing_steps=max(arguments.steps // 2, 1), log_every=max(arguments.steps // 20, 1),
    )  # fmt: skip
    found = []
    for design in designs:
        for seed in arguments.seeds if design.is_trained else [0]:
            print(f"--- {design.name}, seed {seed}", flush=True)
            found.append((design, seed, bench.train(design, seed, settings)))
    return found


def _perceived(
    bench: Bench, found: list[tuple[Design, int, Path]], arguments: argparse.Namespace, split: str
) -> list[dict[str, Any]]:
    from asking import ask_all
    from results import CONTROLS, rows_of

    log = arguments.folder / f"asked-{split}.jsonl"
    names = {"baseline", *(design.name for design, _, _ in found)}
    asked = ask_all(bench, found, split, arguments.cases, log, arguments.groups)
    records = [record for record in asked if record["arm"] in names]
    return [row for against in ("baseline", *CONTROLS) for row in rows_of(records, "perception", against)]


def _letters(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = (
        r for r in rows if r["metric"] == "letters" and r["difficulty"] == "all" and r["group"] == "ocr"
    )
    return row


def _write(arguments: argparse.Namespace, part: str, rows: list[dict[str, Any]]) -> None:
    import torch
    from results import table

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = provenance(arguments.seeds, device, tiny=arguments.tiny, settings=_plain(vars(arguments)))
    folder = arguments.folder
    write_json(folder / f"{part}-about.json", about)
    write_json(folder / ("results.json" if part == "final" else f"{part}.json"), rows)
    shown = [row for row in rows if row.get("against", "baseline") == "baseline"]
    write_whole(folder / f"{part}.md", lambda file: file.write_text(table(shown), encoding="utf-8"))
    print(table([row for row in shown if row["difficulty"] == "all"]))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["train", "choose", "final", "curves"])
    parser.add_argument("--folder", type=Path, required=True, help="packs, runs, records and results")
    parser.add_argument("--packs", type=Path, help="where features are kept; default: in the folder")
    parser.add_argument("--designs", nargs="+", choices=sorted(EXTRA), help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=12_000, help="lessons of each kind")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cases", type=int, default=500, help="held-out cases a group")
    parser.add_argument("--groups", nargs="+", choices=GROUPS[:3], default=GROUPS[:3], help="to ask about")
    parser.add_argument("--splits", nargs="+", choices=["test", "novel"], default=["test", "novel"])
    parser.add_argument("--edits", type=int, default=500, help="edited cases a group; 0: none")
    parser.add_argument("--edit-seeds", type=int, default=3, help="so many of the training seeds are edited")
    parser.add_argument("--edit-steps", type=int, default=20, help="denoising steps of an edit")
    parser.add_argument("--batch-arms", type=int, default=1, help="edits that are denoised together")
    parser.add_argument("--workers", type=int, default=0, help="processes that render, or measure edits")
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    arguments = parser.parse_args(given)
    if arguments.tiny:
        for name, value in TINY.items():
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    main()
