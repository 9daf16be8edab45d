"""Train the arms, ask and edit through them on held-out cases, and write results.json, a table and figures.

    python recipes/experiment/run.py choose --folder runs/experiment     # designs, on the validation split
    python recipes/experiment/run.py final --folder runs/experiment      # the arms, on the test split, once
    python recipes/experiment/run.py curves --folder runs/experiment     # strength, rank, amount of data

Each part goes on where it was stopped. `--processes` shares the work out; they may all use one GPU. `--tiny`
rehearses everything on a CPU in minutes; its figures prove nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from asking import Exam, ask
from bench import Bench
from designs import AMOUNTS, ARMS, DESIGNS, EXTRA, RANKS, STRENGTHS, Design, with_starts
from editing import Edits, edit_part
from hands import Hands
from results import CONTROLS, draw_curve, draw_differences, level_shares, rows_of, table

from qwen_vision_bridge.comparisons import BASELINE
from qwen_vision_bridge.records import provenance, write_json, write_whole
from qwen_vision_bridge.settings import TrainingSettings
from qwen_vision_bridge.world import GROUPS

TINY = {"samples": 24, "cases": 6, "edits": 2, "steps": 2, "batch": 2, "seeds": [0], "edit_steps": 2}

Record = dict[str, Any]
Row = dict[str, Any]


def main(given: Sequence[str] | None = None) -> None:
    """Run one part of the experiment."""
    arguments = _arguments(given)
    settings = TrainingSettings(
        max_train_steps=arguments.steps, train_batch_size=arguments.batch,
        checkpointing_steps=max(arguments.steps // 2, 1), log_every=max(arguments.steps // 20, 1),
    )  # fmt: skip
    workers = -(-arguments.workers // max(arguments.processes, 1))
    make = partial(Bench, arguments.folder, arguments.samples, workers, arguments.packs, settings)
    with Hands(make, arguments.processes) as hands:
        {"choose": choose, "final": final, "curves": curves}[arguments.part](hands, arguments)


def choose(hands: Hands, arguments: argparse.Namespace) -> None:
    """All designs on the validation split, by perception, and by edits where they are asked for."""
    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else DESIGNS
    exam = Exam("validation", tuple(arguments.groups), arguments.cases)
    found = _trained(hands, designs, arguments, [exam])
    asked = _asked(hands, found, [exam])
    edited = _edited(hands, found, arguments, "validation", arguments.edits or 0)
    if not arguments.records_only:
        _write(arguments, "choose", [*_all_rows(asked, "perception"), *_all_rows(edited, "edit")])


def final(hands: Hands, arguments: argparse.Namespace) -> None:
    """All arms on the test split, and on words and pairs that no training has shown."""
    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else ARMS
    exams = [Exam(split, tuple(arguments.groups), arguments.cases) for split in arguments.splits]
    found = _trained(hands, designs, arguments, exams)
    asked = _asked(hands, found, exams)
    edits = 500 if arguments.edits is None else arguments.edits
    edited = _edited(hands, found, arguments, "test", edits)
    if arguments.records_only:
        return
    rows = [
        {**row, "split": exam.split}
        for exam in exams
        for row in _all_rows([r for r in asked if r["split"] == exam.split], "perception")
    ]
    rows += [{**row, "split": "test"} for row in _all_rows(edited, "edit")]
    write_json(arguments.folder / "levels.json", level_shares(edited))
    _write(arguments, "final", rows)
    against_baseline = [row for row in rows if row["against"] == BASELINE and row["split"] == "test"]
    for gain, metric in (("perception", "letters"), ("perception", "answered"), ("edit", "right")):
        draw_differences(against_baseline, arguments.folder / f"{gain}-{metric}.png", gain, metric)


def curves(hands: Hands, arguments: argparse.Namespace) -> None:
    """Letters read on the validation split by strength, by rank and by the amount of data."""
    exam = Exam("validation", ("ocr",), arguments.cases, only="read")
    exams = {strength: exam._replace(strength=strength) for strength in STRENGTHS}
    by_strength = _trained(hands, [EXTRA["perceive"]], arguments, list(exams.values()))
    others = _trained(hands, [*RANKS, *AMOUNTS], arguments, [exam])
    if arguments.records_only:
        return
    rows, points = [], []
    for strength, one in exams.items():
        records = [*_asked(hands, [], [exam]), *_asked(hands, by_strength, [one], baseline=False)]
        rows.append({**_letters(records, "perceive"), "strength": strength})
        points.append((strength, rows[-1]))
    _draw(points, arguments.folder / "strength.png", "strength")
    asked = _asked(hands, others, [exam])
    for name, designs in (("rank", RANKS), ("lessons", AMOUNTS)):
        found = [_letters(asked, design.name) for design in designs]
        sizes = [float("".join(filter(str.isdigit, row["arm"]))) for row in found]
        _draw(zip(sizes, found, strict=True), arguments.folder / f"{name}.png", name)
        rows += found
    _write(arguments, "curves", rows)


def _trained(
    hands: Hands, designs: Sequence[Design], arguments: argparse.Namespace, exams: Sequence[Exam]
) -> list[tuple[str, int]]:
    """Make what is needed, then train the designs and ask them; their names and seeds."""
    folder = arguments.folder
    rounds = with_starts(designs)
    every = [(design, seed) for some in rounds for design in some for seed in design.seeds(arguments.seeds)]
    untrained = [design for design, seed in every if not design.is_finished(folder, seed)]
    kinds = {kind for design in untrained for kind in design.kinds}
    found = [(design.name, seed) for design in designs for seed in design.seeds(arguments.seeds)]
    unasked = [
        ("questions", group, exam.split, exam.count)
        for exam in exams
        for group in exam.groups
        for arm in [(BASELINE, 0), *found]
        if not exam.kept(folder, group, *arm).is_file()
    ]
    hands.do(_look, list(dict.fromkeys([*(("lessons", kind) for kind in sorted(kinds)), *unasked])))
    for some in rounds:
        costly_first = sorted(some, key=lambda design: "edit" not in design.method)
        jobs = [(design, seed) for design in costly_first for seed in design.seeds(arguments.seeds)]
        hands.do(_finish, [(d.name, seed, tuple(exams) if d in designs else ()) for d, seed in jobs])
    return found


def _look(bench: Bench, what: str, *arguments: Any) -> None:
    getattr(bench, what)(*arguments)


def _finish(bench: Bench, name: str, seed: int, exams: Sequence[Exam]) -> None:
    print(f"--- {name}, seed {seed}", flush=True)
    bench.train(EXTRA[name], seed)
    ask(bench, name, seed, exams)


def _asked(
    hands: Hands, found: Iterable[tuple[str, int]], exams: Sequence[Exam], baseline: bool = True
) -> list[Record]:
    arms = [*([(BASELINE, 0)] if baseline else []), *found]
    return [record for records in hands.do(ask, [(*arm, tuple(exams)) for arm in arms]) for record in records]


def _edited(
    hands: Hands, found: Iterable[tuple[str, int]], arguments: argparse.Namespace, split: str, count: int
) -> list[Record]:
    if not count:
        return []
    seeds = arguments.seeds[: arguments.edit_seeds]
    some = arguments.edit_designs or EXTRA
    arms = [(arm, seed) for arm, seed in found if arm in some and (seed in seeds or not seed)]
    parts = max(hands.count, 1)
    edits = Edits(
        split, tuple(arguments.groups), count, arguments.edit_steps, arguments.batch_arms,
        arguments.parts or parts,
    )  # fmt: skip
    given = [(arms, edits, part) for part in range(edits.parts)]
    return [record for records in hands.do(edit_part, given) for record in records]


def _all_rows(records: Sequence[Record], gain: str) -> list[Row]:
    return [row for against in (BASELINE, *CONTROLS) for row in rows_of(records, gain, against)]


def _letters(records: Sequence[Record], arm: str) -> Row:
    (row,) = (
        row
        for row in rows_of([r for r in records if r["arm"] in (BASELINE, arm)], "perception")
        if row["metric"] == "letters" and row["difficulty"] == "all"
    )
    return row


def _draw(points: Iterable[tuple[float, Row]], path: Path, name: str) -> None:
    draw_curve([(x, row["diff"], row["ci_low"], row["ci_high"]) for x, row in points], path, name)


def _write(arguments: argparse.Namespace, part: str, rows: list[Row]) -> None:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = provenance(arguments.seeds, device, tiny=arguments.tiny, settings=_plain(vars(arguments)))
    folder = arguments.folder
    write_json(folder / f"{part}-about.json", about)
    write_json(folder / ("results.json" if part == "final" else f"{part}.json"), rows)
    shown = [row for row in rows if row.get("against", BASELINE) == BASELINE]
    write_whole(folder / f"{part}.md", lambda file: file.write_text(table(shown), encoding="utf-8"))
    print(table([row for row in shown if row["difficulty"] == "all"]))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["choose", "final", "curves"])
    parser.add_argument("--folder", type=Path, required=True, help="packs, runs, records and results")
    parser.add_argument("--packs", type=Path, help="where features are kept; default: in the folder")
    parser.add_argument("--designs", nargs="+", choices=sorted(EXTRA), help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=12_000, help="lessons of each kind")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cases", type=int, default=500, help="held-out cases a group")
    parser.add_argument("--groups", nargs="+", choices=GROUPS[:3], default=GROUPS[:3], help="of cases")
    parser.add_argument("--splits", nargs="+", choices=["test", "novel"], default=["test", "novel"])
    parser.add_argument(
        "--edits", type=int, help="edited cases a group; default: 500 in the final test, 0 in a choice"
    )
    parser.add_argument("--edit-designs", nargs="+", choices=sorted(EXTRA), help="edit through these alone")
    parser.add_argument("--edit-seeds", type=int, default=3, help="so many of the training seeds are edited")
    parser.add_argument("--edit-steps", type=int, default=20, help="denoising steps of an edit")
    parser.add_argument("--batch-arms", type=int, default=1, help="edits that are denoised together")
    parser.add_argument("--processes", type=int, default=0, help="that share the work; 0 is this one alone")
    parser.add_argument("--workers", type=int, default=0, help="that render or measure, of all processes")
    parser.add_argument("--parts", type=int, help="of the edited cases; default: one a process")
    parser.add_argument(
        "--records-only", action="store_true", help="leave tables and figures to a later call"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    arguments = parser.parse_args(given)
    if arguments.tiny:
        for name, value in TINY.items():
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    main()
