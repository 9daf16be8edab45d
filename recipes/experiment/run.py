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
from itertools import product
from pathlib import Path
from typing import Any

from qwen_vision_bridge.evaluation.statistics import BASELINE
from qwen_vision_bridge.io import provenance, write_json, write_whole
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.specs import read_json
from qwen_vision_bridge.synthetic.cases import GROUPS
from qwen_vision_bridge.training.config import TrainingSettings

from .asking import Exam, ask
from .bench import Bench, samples_parts
from .designs import AMOUNTS, ARMS, DESIGNS, EXTRA, RANKS, STRENGTHS, Design, with_starts
from .editing import SITES, Edits, draw, measure
from .hands import Hands, Job
from .results import CONTROLS, draw_curve, draw_differences, level_shares, rows_of, table

TINY = {"samples": 24, "cases": 6, "edits": 2, "steps": 2, "batch": 2, "seeds": [0], "edit_steps": 2}

Record = dict[str, Any]
Row = dict[str, Any]


def main(given: Sequence[str] | None = None) -> None:
    """Run one part of the experiment."""
    arguments = _arguments(given)
    settings = TrainingSettings(
        max_train_steps=arguments.steps,
        train_batch_size=arguments.batch,
        checkpointing_steps=max(arguments.steps // 2, 1),
        log_every=max(arguments.steps // 20, 1),
    )
    workers = -(-arguments.workers // max(arguments.processes, 1))
    make = partial(Bench, arguments.folder, arguments.samples, workers, arguments.packs, settings)
    with Hands(make, arguments.processes) as hands:
        {"choose": choose, "final": final, "curves": curves}[arguments.part](hands, arguments)
    if arguments.records_only:
        write_json(arguments.folder / f"{arguments.part}-records.json", _about(arguments))


def choose(hands: Hands, arguments: argparse.Namespace) -> None:
    """All designs on the validation split, by perception, and by edits where they are asked for."""
    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else DESIGNS
    exam = Exam("validation", tuple(arguments.groups), arguments.cases)
    edits = _edits(designs, arguments, "validation", arguments.edits or 0, SITES)
    asked, edited = _done(hands, designs, arguments, [exam], edits)
    if not arguments.records_only:
        _write(arguments, "choose", [*_all_rows(asked, "perception"), *_all_rows(edited, "edit")])


def final(hands: Hands, arguments: argparse.Namespace) -> None:
    """All arms on the test split, and on words and pairs that no training has shown."""
    designs = [EXTRA[name] for name in arguments.designs] if arguments.designs else ARMS
    exams = [Exam(split, tuple(arguments.groups), arguments.cases) for split in arguments.splits]
    edits = _edits(designs, arguments, "test", 500 if arguments.edits is None else arguments.edits)
    asked, edited = _done(hands, designs, arguments, exams, edits)
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
    by_strength, _ = _done(hands, [EXTRA["perceive"]], arguments, list(exams.values()))
    amounts = [design for design in AMOUNTS if design.samples < arguments.samples]
    others, _ = _done(hands, [*RANKS, *amounts], arguments, [exam])
    if arguments.records_only:
        return
    baseline = [record for record in others if record["arm"] == BASELINE]
    rows, points = [], []
    for strength in exams:
        some = [r for r in by_strength if r["arm"] == "perceive" and r["strength"] == strength]
        row = _letters([*baseline, *some], "perceive")
        rows.append({**row, "arm": f"perceive at strength {strength:g}", "strength": strength})
        points.append((strength, rows[-1]))
    _draw(points, arguments.folder / "strength.png", "strength")
    whole = next(row for row in rows if row["strength"] == 1.0)
    for name, designs in (("rank", RANKS), ("samples", amounts)):
        found = [_letters(others, design.name) for design in designs]
        points = [(float("".join(filter(str.isdigit, row["arm"]))), row) for row in found]
        if name == "samples":
            points.append((float(arguments.samples), whole))
        _draw(points, arguments.folder / f"{name}.png", name, log=True)
        rows += found
    _write(arguments, "curves", rows)


def _edits(
    designs: Sequence[Design],
    arguments: argparse.Namespace,
    split: str,
    count: int,
    sites: Sequence[str] = SITES[:1],
) -> list[tuple[str, int, Edits]]:
    """What is edited in which arm and seed, first seeds first; the first of `perceive` at all the sites."""
    some = arguments.edit_designs or EXTRA
    arms = [(d.name, seed) for d in designs if d.name in some for seed in d.seeds(arguments.seeds)]
    wanted = []
    for group, (arm, seed) in product(arguments.groups if count else (), [(BASELINE, 0), *arms]):
        most = arguments.detail_seeds if group == "detail" else arguments.edit_seeds
        if seed not in (0, *arguments.seeds[:most]):  # what no seed changes has seed 0
            continue
        edits = Edits(split, group, count, arguments.edit_steps, arguments.batch_arms, parts=arguments.parts)
        places = sites if (arm, seed) == ("perceive", 0) else SITES[:1]
        for site, part in product(places, range(arguments.parts)):
            wanted.append((arm, seed, edits._replace(site=site, part=part)))
    return sorted(wanted, key=lambda one: one[1])


def _done(
    hands: Hands,
    designs: Sequence[Design],
    arguments: argparse.Namespace,
    exams: Sequence[Exam],
    edits: Sequence[tuple[str, int, Edits]] = (),
) -> tuple[list[Record], list[Record]]:
    """Train the designs and what they start from, ask them and edit through them; both kinds of records."""
    folder = arguments.folder
    every = [(d, seed) for d in with_starts(designs) for seed in d.seeds(arguments.seeds)]
    untrained = [design for design, seed in every if not design.is_finished(folder, seed)]
    samples = {
        kind: [("samples", kind, n) for n in range(len(samples_parts(kind, arguments.samples)))]
        for kind in sorted({kind for design in untrained for kind in design.kinds})
    }
    arms = [(BASELINE, 0)] + [(d.name, seed) for d in designs for seed in d.seeds(arguments.seeds)]
    unasked = {
        ("questions", group, exam.split, exam.count): None
        for exam in exams
        for group in exam.groups
        for arm in arms
        if not exam.kept(folder, group, *arm).is_file()
    }
    jobs: dict[Any, Job] = {name: Job(_samples, name[1:]) for names in samples.values() for name in names}
    jobs |= {name: Job(_questions, name[1:]) for name in unasked}
    for design, seed in every:
        needs = [name for kind in design.kinds for name in samples.get(kind, ())]
        if design.start is not None:
            start = EXTRA[design.start]
            needs.append(("train", start.name, seed if start.is_trained else 0))
        jobs["train", design.name, seed] = Job(_train, (design.name, seed), tuple(needs))
    for arm in arms:
        needs = (*unasked, *([] if arm[0] == BASELINE else [("train", *arm)]))
        jobs["ask", *arm] = Job(ask, (*arm, tuple(exams)), needs)
    for arm, seed, some in edits:
        needs = () if arm == BASELINE else (("train", arm, seed),)
        jobs["draw", arm, seed, some] = Job(draw, (arm, seed, some), needs)
        if some.group not in arguments.draw_only:
            jobs["edit", arm, seed, some] = Job(measure, (arm, seed, some), (("draw", arm, seed, some),))
    found = hands.do(jobs)
    return tuple(
        [record for name, records in found.items() if name[0] == kind for record in records]
        for kind in ("ask", "edit")
    )


def _samples(bench: Bench, kind: str, number: int) -> None:
    bench.samples_part(kind, number)


def _questions(bench: Bench, group: str, split: str, count: int) -> None:
    bench.questions(group, split, count)


def _train(bench: Bench, name: str, seed: int) -> None:
    print(f"--- {name}, seed {seed}", flush=True)
    bench.train(EXTRA[name], seed)


def _all_rows(records: Sequence[Record], gain: str) -> list[Row]:
    return [row for against in (BASELINE, *CONTROLS) for row in rows_of(records, gain, against)]


def _letters(records: Sequence[Record], arm: str) -> Row:
    (row,) = (
        row
        for row in rows_of([r for r in records if r["arm"] in (BASELINE, arm)], "perception")
        if row["metric"] == "letters" and row["difficulty"] == "all"
    )
    return row


def _draw(points: Iterable[tuple[float, Row]], path: Path, name: str, log: bool = False) -> None:
    draw_curve([(x, row["diff"], row["ci_low"], row["ci_high"]) for x, row in points], path, name, log)


def _write(arguments: argparse.Namespace, part: str, rows: list[Row]) -> None:
    folder, records = arguments.folder, arguments.folder / f"{part}-records.json"
    about = _about(arguments)
    if records.is_file():  # made by an earlier call, perhaps on another machine
        about = {"records": read_json(records), "tables": about}
    write_json(folder / f"{part}-about.json", about)
    write_json(folder / ("results.json" if part == "final" else f"{part}.json"), rows)
    shown = [row for row in rows if row.get("against", BASELINE) == BASELINE]
    write_whole(folder / f"{part}.md", lambda file: file.write_text(table(shown), encoding="utf-8"))
    print(table([row for row in shown if row["difficulty"] == "all"]))


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    return provenance(arguments.seeds, device, tiny=arguments.tiny, settings=_plain(vars(arguments)))


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
    parser.add_argument("--samples", type=int, default=12_000, help="samples of each kind")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cases", type=int, default=500, help="held-out cases a group")
    parser.add_argument("--groups", nargs="+", choices=GROUPS[:3], default=GROUPS[:3], help="of cases")
    parser.add_argument("--splits", nargs="+", choices=["test", "novel"], default=["test", "novel"])
    parser.add_argument(
        "--edits", type=int, help="edited cases a group; default: 500 in the final test, 0 in a choice"
    )
    parser.add_argument("--edit-designs", nargs="+", choices=sorted(EXTRA), help="edit through these alone")
    parser.add_argument("--detail-seeds", type=int, default=3, help="the same in the group `detail`")
    parser.add_argument("--edit-seeds", type=int, default=3, help="so many of the training seeds are edited")
    parser.add_argument("--edit-steps", type=int, default=20, help="denoising steps of an edit")
    parser.add_argument("--batch-arms", type=int, default=1, help="edits that are denoised together")
    parser.add_argument("--processes", type=int, default=0, help="that share the work; 0 is this one alone")
    parser.add_argument("--workers", type=int, default=0, help="that render or measure, of all processes")
    parser.add_argument(
        "--draw-only", nargs="+", choices=GROUPS[:3], default=[], help="leave measuring these to a later call"
    )
    parser.add_argument("--parts", type=int, default=1, help="jobs that an arm's edits are split into")
    parser.add_argument(
        "--records-only", action="store_true", help="leave tables and figures to a later call"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    arguments = parser.parse_args(given)
    arguments.records_only |= bool(arguments.draw_only)
    if arguments.tiny:
        for name, value in TINY.items():
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    main()
