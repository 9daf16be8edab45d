"""Train the arms, evaluate them on held-out cases, and write results.json, a table and figures.

    python -m recipes.experiment.run choose --folder runs/experiment   # designs, on the validation split
    python -m recipes.experiment.run final --folder runs/experiment    # the arms, on the test split, once
    python -m recipes.experiment.run curves --folder runs/experiment   # strength, rank, amount of data

Each part goes on where it was stopped. Under `accelerate launch` the processes train each design together and
share the cases. `--tiny` rehearses everything on a CPU in minutes; its figures prove nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from qwen_vision_bridge.case import GROUPS
from qwen_vision_bridge.evaluation.arms import Arm
from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
from qwen_vision_bridge.evaluation.report.figures import difference_figure
from qwen_vision_bridge.evaluation.statistics import BASELINE
from qwen_vision_bridge.injection import Site
from qwen_vision_bridge.io import provenance, write_image, write_json, write_text
from qwen_vision_bridge.loading.memory import device_name
from qwen_vision_bridge.synthetic.cases import make_cases
from qwen_vision_bridge.training.config import TrainingSettings

from .arms import arm_of
from .bench import Bench
from .designs import AMOUNTS, ARMS, DESIGNS, EXTRA, RANKS, SITES, STRENGTHS, Design, with_starts
from .results import CONTROLS, Record, Row, differences, draw_curve, level_shares, rows_of, table

TINY = {"samples": 24, "cases": 6, "edits": 2, "steps": 2, "batch": 2, "seeds": [0], "edit_steps": 2}
CASE_SEED = 7


@dataclass(frozen=True)
class Entry:
    """One arm to evaluate: a design at a training seed."""

    design: Design
    seed: int
    site: Site = "tower"
    strength: float = 1.0

    @property
    def name(self) -> str:
        """In tables."""
        at = "" if self.site == "tower" else f" at {self.site}"
        return self.design.name + at + ("" if self.strength == 1.0 else f" at strength {self.strength:g}")


class Experiment:
    """Bench and arguments of one part, and the arms' names in its records."""

    def __init__(self, bench: Bench, arguments: argparse.Namespace) -> None:
        self.bench, self.arguments = bench, arguments
        self.names: dict[str, tuple[str, int]] = {}

    def entries(self, designs: Sequence[Design]) -> list[Entry]:
        """The designs at all training seeds, trained with everything that they start from."""
        for design in with_starts(designs):
            for seed in design.seeds(self.arguments.seeds):
                self.bench.train(design, seed)
        return [Entry(d, seed) for d in designs for seed in d.seeds(self.arguments.seeds)]

    def evaluated(
        self, entries: Sequence[Entry], split: str, groups: Sequence[str], count: int, edits: bool
    ) -> list[Record]:
        """Records of questions, or of edits, about so many cases a group; of the first process alone."""
        arguments, pipeline = self.arguments, self.bench.pipeline
        if not (count and entries):
            return []
        arms = [Arm(BASELINE)]
        for entry in entries:
            arm = arm_of(entry.design, entry.seed, arguments.folder, pipeline, entry.site, entry.strength)
            self.names[arm.name] = (entry.name, entry.seed)
            arms.append(arm)
        cases = [case for group in groups for case in make_cases(group, count, CASE_SEED, split=split)]
        options = EvaluationOptions(arguments.batch_arms, arguments.workers, edits=edits)
        result = evaluate(
            pipeline,
            cases,
            arguments.folder / "evaluated" / split,
            arms,
            perception=not edits,
            options=options,
            num_inference_steps=arguments.edit_steps,
        )
        return [] if result is None else result.records

    def edited(self, entries: Sequence[Entry], split: str, count: int) -> list[Record]:
        """Records of edits, with so many of the training seeds as are edited."""
        seeds = (0, *self.arguments.seeds[: self.arguments.edit_seeds])  # what no seed changes has seed 0
        some = self.arguments.edit_designs or EXTRA
        chosen = [entry for entry in entries if entry.seed in seeds and entry.design.name in some]
        return self.evaluated(chosen, split, self.arguments.groups, count, edits=True)

    def rows(self, records: Sequence[Record], split: str) -> list[Row]:
        """Rows beside the baseline and beside both controls."""
        return [
            {**row, "split": split}
            for against in (BASELINE, *CONTROLS)
            for row in rows_of(records, self.names, against)
        ]

    def write(self, part: str, rows: list[Row]) -> None:
        """Write rows and table, and how they came about."""
        folder = self.arguments.folder
        device = device_name("cuda" if torch.cuda.is_available() else "cpu")
        settings = json.loads(json.dumps(vars(self.arguments), default=str))
        about = provenance(self.arguments.seeds, device, tiny=self.arguments.tiny, settings=settings)
        write_json(folder / f"{part}-about.json", about)
        write_json(folder / ("results.json" if part == "final" else f"{part}.json"), rows)
        shown = [row for row in rows if row["against"] == BASELINE]
        write_text(folder / f"{part}.md", table(shown))
        print(table([row for row in shown if row["difficulty"] == "all"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part of the experiment."""
    arguments = _arguments(argv)
    settings = TrainingSettings(
        max_train_steps=arguments.steps,
        train_batch_size=arguments.batch,
        checkpointing_steps=max(arguments.steps // 2, 1),
        log_every=max(arguments.steps // 20, 1),
    )
    bench = Bench(arguments.folder, arguments.samples, arguments.workers, arguments.packs, settings)
    {"choose": choose, "final": final, "curves": curves}[arguments.part](Experiment(bench, arguments))


def choose(experiment: Experiment) -> None:
    """All designs on the validation split, by perception, and by edits where they are asked for."""
    arguments = experiment.arguments
    entries = experiment.entries(_designs(arguments, DESIGNS))
    asked = experiment.evaluated(entries, "validation", arguments.groups, arguments.cases, edits=False)
    first = next((entry for entry in entries if (entry.design.name, entry.seed) == ("perceive", 0)), None)
    sites = [Entry(first.design, 0, site) for site in SITES[1:]] if first else []
    edited = experiment.edited([*entries, *sites], "validation", arguments.edits or 0)
    if experiment.bench.accelerator.is_main_process:
        experiment.write("choose", experiment.rows([*asked, *edited], "validation"))


def final(experiment: Experiment) -> None:
    """All arms on the test split, and on words and pairs that no training has shown."""
    arguments = experiment.arguments
    entries = experiment.entries(_designs(arguments, ARMS))
    asked = {
        split: experiment.evaluated(entries, split, arguments.groups, arguments.cases, edits=False)
        for split in arguments.splits
    }
    edited = experiment.edited(entries, "test", 500 if arguments.edits is None else arguments.edits)
    if not experiment.bench.accelerator.is_main_process:
        return
    rows = [row for split, records in asked.items() for row in experiment.rows(records, split)]
    experiment.write("final", [*rows, *experiment.rows(edited, "test")])
    write_json(arguments.folder / "levels.json", level_shares(edited, experiment.names))
    for records, metric in (
        (asked.get("test", []), "letters"),
        (asked.get("test", []), "answered"),
        (edited, "right"),
    ):
        all_cases = differences(records, experiment.names)
        headline = [row for row in all_cases if (row.metric, row.difficulty) == (metric, "all")]
        if headline:
            path = arguments.folder / f"{headline[0].level}-{metric}.png"
            write_image(path, difference_figure(headline))


def curves(experiment: Experiment) -> None:
    """Letters read on the validation split by strength, by rank and by the amount of data."""
    arguments = experiment.arguments
    amounts = [design for design in AMOUNTS if design.samples < arguments.samples]
    perceive = EXTRA["perceive"]
    experiment.entries([perceive])
    others = experiment.entries([*RANKS, *amounts])
    by_strength = [
        Entry(perceive, seed, strength=strength)
        for strength, seed in product(STRENGTHS, perceive.seeds(arguments.seeds))
    ]
    records = experiment.evaluated(
        [*by_strength, *others], "validation", ("ocr",), arguments.cases, edits=False
    )
    if not experiment.bench.accelerator.is_main_process:
        return
    rows = {
        row["arm"]: row
        for row in rows_of(records, experiment.names)
        if row["metric"] == "letters" and row["difficulty"] == "all"
    }
    strengths = {entry.strength: rows[entry.name] for entry in by_strength}
    draw_curve(list(strengths.items()), arguments.folder / "strength.png", "strength")
    ranks = [(float(design.config["rank"]), rows[design.name]) for design in RANKS]
    draw_curve(ranks, arguments.folder / "rank.png", "rank", log=True)
    samples = [(float(design.samples or 0), rows[design.name]) for design in amounts]
    samples.append((float(arguments.samples), rows["perceive"]))
    draw_curve(samples, arguments.folder / "samples.png", "samples", log=True)
    experiment.write("curves", list(rows.values()))


def _designs(arguments: argparse.Namespace, default: Sequence[Design]) -> Sequence[Design]:
    return [EXTRA[name] for name in arguments.designs] if arguments.designs else default


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=["choose", "final", "curves"])
    add("--folder", type=Path, required=True, help="packs, runs, records and results")
    add("--packs", type=Path, help="where features are kept; default: in the folder")
    add("--designs", nargs="+", choices=sorted(EXTRA), help="these alone")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--samples", type=int, default=12_000, help="samples of each kind")
    add("--steps", type=int, default=1500, help="of training")
    add("--batch", type=int, default=64, help="samples of a training step")
    add("--cases", type=int, default=500, help="held-out cases a group to ask about")
    add("--groups", nargs="+", choices=GROUPS[:3], default=GROUPS[:3], help="of cases")
    add("--splits", nargs="+", choices=["test", "novel"], default=["test", "novel"])
    add("--edits", type=int, help="edited cases a group; default: 500 in the final test, 0 in a choice")
    add("--edit-designs", nargs="+", choices=sorted(EXTRA), help="edit through these alone")
    add("--edit-seeds", type=int, default=3, help="so many of the training seeds are edited")
    add("--edit-steps", type=int, default=20, help="denoising steps of an edit")
    add("--batch-arms", type=int, default=1, help="edits that are denoised together")
    add("--workers", type=int, default=0, help="processes that render or measure")
    add("--tiny", action="store_true", help="rehearse")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        vars(arguments).update(TINY)
    return arguments


if __name__ == "__main__":
    main()
