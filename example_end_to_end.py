"""Seven examples of Qwen-Image-Edit without and with Qwen3-VL's vision; without --example, a menu.

1 basic comparison, 2 OCR capability, 3 spatial reasoning, 4 detail preservation, 5 full evaluation,
6 attention visualization, 7 run all. Examples 2 to 5 edit synthetic images with known answers and measure
them; with --image they edit your image instead and measure what needs no known answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vision_bridge.cli import check_inputs, choose_models, parser, run
from qwen_vision_bridge.evaluation.options import add_edit_options, add_evaluation_options

if TYPE_CHECKING:
    from qwen_vision_bridge.case import Case
    from qwen_vision_bridge.evaluation.arms import Arm
    from qwen_vision_bridge.pairs import Comparison
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

PROMPT = 'Change the text to "FOX".'
STRIPED = "Of 29 such cases (test split, 3 training seeds) the baseline gets 52 % right, the bridge 95 %."
GROUPS = {2: ("ocr", "ocr_tests"), 3: ("space", "spatial_tests"), 4: ("detail", "detail_tests")}
MENU = """
1. Basic comparison - baseline and enhanced side by side
2. OCR capability - multi-lingual text editing
3. Spatial reasoning - object repositioning
4. Detail preservation - texture maintenance
5. Full evaluation - all of 2, 3 and 4, and consistency between images, in one report
6. Attention visualization - which level the bridge draws on, and where
7. Run all - a quick tour: 1, then 5 with two cases a group (which covers 2, 3 and 4), then 6
q. Quit
Miniature, two CPU cores: 1 and 6 take about half a minute, 2, 3 and 4 two minutes each, 7 one minute.
"""
HOW_LONG = """5 takes about {quick} quick (2 cases a group, few steps: shows that all runs), {full} in full
(enough cases to see a difference of 5 points). [q]uick, [f]ull or [b]ack: """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one example, or ask which."""
    arguments = parse(argv)
    check_inputs(arguments)
    check_combination(arguments)
    session = Session(arguments)
    if arguments.example is not None:
        session.run(arguments.example)
        return 0
    while (choice := ask()) is not None:
        try:
            session.run(choice, ask_size=True)
        except KeyboardInterrupt:
            print("\nStopped; what was finished is kept. Back to the menu.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line."""
    options = parser(__doc__, PROMPT)
    add_edit_options(options)
    add_evaluation_options(options)
    return options.parse_args(argv)


def check_combination(arguments: argparse.Namespace) -> None:
    """Refuse arguments that an example would ignore.

    Raises:
        ValueError: which argument, and where it has an effect.
    """
    if arguments.case_folder is not None and arguments.image:
        raise ValueError("--image and --case-folder both say what to edit: give one of them")
    if arguments.case_folder is not None and arguments.example in (1, 6):
        raise ValueError("--case-folder is for examples 2 to 5, and 7")
    if arguments.arm and arguments.example in (1, 6):
        raise ValueError("--arm is for examples 2 to 5, and 7; examples 1 and 6 take --bridge")
    if arguments.image and len(arguments.image) > 1 and arguments.example == 6:
        raise ValueError("example 6 takes one --image")


def ask() -> int | None:
    """A number from the menu, or None to quit."""
    print(MENU)
    while True:
        try:
            answer = input("Select an example (1-7, q to quit): ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if answer in ("q", "quit", "exit", "0"):
            return None
        if answer in "1234567" and len(answer) == 1:
            return int(answer)
        print(f"{answer!r} is not on the menu.")


def ask_quick(is_small: bool) -> bool | None:
    """Whether example 5 is to be quick; None goes back to the menu."""
    quick, full = ("a minute", "10 hours on two CPU cores") if is_small else ("an hour", "2 days on a GPU")
    while True:
        try:
            answer = input(HOW_LONG.format(quick=quick, full=full)).strip().lower()
        except EOFError:
            return None
        if answer in ("q", "quick", "f", "full"):
            return answer.startswith("q")
        if answer in ("", "b", "back"):
            return None
        print(f"{answer!r} is none of them.")


class Session:
    """The arguments and the pipeline they ask for, loaded once for any number of examples."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from qwen_vision_bridge.bridge import check_strength
        from qwen_vision_bridge.distributed import Processes
        from qwen_vision_bridge.evaluation.arms import BASELINE, Arm, parse_arm
        from qwen_vision_bridge.evaluation.public_datasets import load_cases
        from qwen_vision_bridge.loading.lora_files import parse_lora
        from qwen_vision_bridge.pairs import check_steps
        from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

        check_strength(arguments.strength)
        self.arguments, self.output = arguments, Path(arguments.output)
        self.options: dict[str, Any] = {}
        if arguments.steps is not None:
            self.options["num_inference_steps"] = check_steps(arguments.steps)
        self.load = partial(
            EnhancedQwenImageEdit,
            choose_models(arguments),
            bridge=arguments.bridge,
            load_in_8bit=arguments.load_in_8bit,
            load_in_4bit=arguments.load_in_4bit,
            offload=arguments.offload,
            device=Processes().device,
        )
        self.pipeline = self.load(fast=arguments.fast, fast_lora=arguments.fast_lora)
        for text in arguments.lora:
            self.pipeline.load_lora(*parse_lora(text))
        self.prompt = arguments.prompt or PROMPT
        self.own_cases: list[Case] = []
        if arguments.case_folder is not None:
            self.own_cases = load_cases(arguments.layout, arguments.case_folder)
        self.arms = None
        if arguments.arm:
            self.arms = [Arm(BASELINE), *(parse_arm(text, self.pipeline.family) for text in arguments.arm)]

    def run(self, example: int, ask_size: bool = False) -> None:
        """Run one example, or with 7 a tour of all of them.

        Args:
            ask_size: ask whether example 5 is to be quick, where no argument says so.
        """
        everything = [*(group for group, _ in GROUPS.values()), "consistency"]
        quick = self.arguments.quick
        if example == 1:
            self.basic_comparison()
        elif example == 5:
            if ask_size and not (quick or self.arguments.cases or self.own_cases or self.arguments.image):
                quick = ask_quick(self.pipeline.family.synthetic_only)
            if quick is not None:
                self.evaluate(everything, "full_evaluation", quick)
        elif example == 6:
            self.attention()
        elif example == 7:
            self.basic_comparison()
            self.evaluate(everything, "full_evaluation", quick or self.arguments.cases is None)
            self.attention()
        else:
            group, folder = GROUPS[example]
            self.evaluate([group], folder, quick)

    def basic_comparison(self) -> None:
        """Example 1: the same edit without and with the bridge."""
        from qwen_vision_bridge.evaluation.metrics.correctness import judge
        from qwen_vision_bridge.images import load_images
        from qwen_vision_bridge.io import write_image
        from qwen_vision_bridge.patches import photo_note
        from qwen_vision_bridge.plots import comparison_sheet

        print("\n=== Basic comparison ===")
        case = self.hard_case()
        images = load_images(case.images if case else self.images())
        prompt = case.prompt if case else self.prompt
        result = self.pipeline.compare(images, prompt, **self.common())
        known, note = None, ""
        if case is not None and case.target is not None and result.baseline.size == case.target.size:
            rights = [judge(case, edited).right for edited in (result.baseline, result.enhanced)]
            known = (case.target, rights[0], rights[1])
            given = self.arguments
            if given.bridge is None and given.strength == 1 and not (given.fast or given.lora):
                note = STRIPED
        photo = photo_note(self.pipeline.family, images)
        about = " · ".join(filter(None, [repr(self.pipeline), note, photo]))
        strength, seed = self.arguments.strength, self.arguments.seed
        sheet = comparison_sheet(
            images, result.baseline, result.enhanced, prompt, seed, strength, about, known
        )
        path = write_image(self.output / "comparison_basic.png", sheet, self.about())
        print(f"Prompt: {prompt}\nBridge: {self.pipeline.bridge_name}")
        print(f"Mean difference of the two edits: {mean_difference(result):.3f} of 255")
        if known is not None:
            words = ["right" if right else "wrong" for right in rights]
            print(f"Baseline: {words[0]}. With the bridge: {words[1]}.")
        print(f"{note}\nSaved: {path}" if note else f"Saved: {path}")

    def hard_case(self) -> Case | None:
        """A hard case with a known answer where the user names neither image nor prompt; miniature only."""
        if self.arguments.image or self.arguments.prompt or not self.pipeline.family.synthetic_only:
            return None
        from qwen_vision_bridge.synthetic.cases import make_cases

        size = self.pipeline.family.image_size
        return make_cases("space", 1, self.arguments.seed, size, kinds=("striped",))[0]

    def attention(self) -> None:
        """Example 6: the level weights over the image."""
        from qwen_vision_bridge.images import load_images
        from qwen_vision_bridge.io import write_image
        from qwen_vision_bridge.plots import attention_figure, preference

        print("\n=== Attention visualization ===")
        case = self.hard_case()
        image = load_images(case.image if case else self.images())[0]
        prompt = case.prompt if case else self.prompt
        attention = self.pipeline.attend(image, prompt)
        shares = attention.share_maps()[0]
        weights = attention.maps()[0]
        about = repr(self.pipeline)
        figure = attention_figure(image, weights, attention.levels, prompt, about, shares)
        path = write_image(self.output / "attention_visualization.png", figure, self.about())
        print("  level   weight  share of the update")
        for index, name in enumerate(attention.levels):
            print(f"  {name:6}  {weights[..., index].mean():.3f}   {shares[..., index].mean():.3f}")
        print(f"  {preference(weights, attention.levels)}\nSaved: {path}")

    def evaluate(self, groups: Sequence[str], folder: str, quick: bool = False) -> None:
        """Examples 2 to 5: every case in every arm, measured and compared in one report."""
        from qwen_vision_bridge.evaluation.evaluate import EvaluationOptions, evaluate
        from qwen_vision_bridge.evaluation.report.html import write_page
        from qwen_vision_bridge.evaluation.report.overview import write_overview
        from qwen_vision_bridge.evaluation.report.tables import TITLES, as_table, write_results

        print(f"\n=== {' · '.join(TITLES[group] for group in groups)} ===")
        path, arguments, options = self.output / folder, self.arguments, self.common()
        cases, notes, arms = self.cases(groups, quick)
        pipeline = (self.few_step_pipeline() if quick else None) or self.pipeline
        if pipeline is not self.pipeline:
            print("Quick: edits in 4 steps without guidance, by the few-step LoRA.")
        elif quick and not arguments.fast:
            options.setdefault("num_inference_steps", 8)
        run_options = EvaluationOptions(
            batch_arms=arguments.batch_arms,
            workers=arguments.workers,
            retry_errors=arguments.retry_errors,
            notes=notes,
            announce=print,
        )
        options |= {"perception": not arguments.no_questions, "options": run_options}
        result = evaluate(pipeline, cases, path, arms, **options)
        if result is not None:  # the first process alone has the result
            write_results(path, result)
            write_page(path, result)
            write_overview(path, result)
            print(as_table(result))
            tasks = sum(record["level"] != "agreement" for record in result.records)
            print(f"Took {result.seconds:.0f} s, {result.done_before} of {tasks} tasks done before.")
        print(f"Saved: {path}/")

    def few_step_pipeline(self) -> EnhancedQwenImageEdit | None:
        """A pipeline for quick evaluations, where a second one costs little and no argument forbids it."""
        given, family = self.arguments, self.pipeline.family
        is_small = family.synthetic_only and 4 in dict(family.editor.few_steps)
        if not is_small or given.fast or given.fast_lora or given.steps or given.lora:
            return None
        return self.load(fast=4)

    def cases(self, groups: Sequence[str], quick: bool) -> tuple[list[Case], list[str], list[Arm] | None]:
        """The cases of these groups, what they leave out, and the arms; the user's own where given."""
        from qwen_vision_bridge.evaluation.statistics import cases_needed
        from qwen_vision_bridge.synthetic.multilingual import cases_for

        if self.arguments.image:
            return self.photographs(groups)
        if self.own_cases:
            own = [case for case in self.own_cases if len(groups) > 1 or case.group in groups]
            if not own:
                raise ValueError(f"{self.arguments.case_folder} has no case of the group {groups[0]!r}")
            return own, [], self.arms
        enough = cases_needed(0.05) if len(groups) > 1 else 4
        count = self.arguments.cases or (2 if quick else enough)
        cases: list[Case] = []
        notes: list[str] = []
        for group in groups:
            some, left_out = cases_for(self.pipeline.family, group, count, self.arguments.seed)
            cases, notes = cases + some, notes + left_out
        return cases, notes, self.arms

    def photographs(self, groups: Sequence[str]) -> tuple[list[Case], list[str], list[Arm]]:
        """The user's image with its prompt, or with some of each group, as the baseline and the bridge."""
        from qwen_vision_bridge.evaluation.arms import default_arms
        from qwen_vision_bridge.evaluation.folder_dataset import OTHER, photo_cases
        from qwen_vision_bridge.evaluation.report.tables import PHOTO_PROMPTS
        from qwen_vision_bridge.images import load_images
        from qwen_vision_bridge.specs import STOCK_AREA

        prompts: dict[str, Sequence[str]] = {group: PHOTO_PROMPTS[group] for group in groups}
        if self.arguments.prompt:
            prompts = {groups[0] if len(groups) == 1 else OTHER: [self.prompt]}
        pipeline = self.pipeline
        *references, image = load_images(self.arguments.image)
        cases = photo_cases(image, prompts, pipeline.family.editor.vae_area or STOCK_AREA, references)
        options = (pipeline.bridge, pipeline.bridge_name, self.arguments.strength, pipeline.options.site)
        notes = ["both controls: one image has no other to take features from, and nothing to be right about"]
        return cases, notes, self.arms or default_arms(*options)[:2]

    def common(self) -> dict[str, Any]:
        """Strength, seed and options of every edit."""
        return {"strength": self.arguments.strength, "seed": self.arguments.seed, **self.options}

    def about(self) -> dict[str, Any]:
        """How an image was made, for its file."""
        return self.pipeline.provenance([self.arguments.seed])

    def images(self) -> list[Path]:
        """The user's images, or the synthetic one, which is written out first."""
        if self.arguments.image:
            return self.arguments.image
        from qwen_vision_bridge.io import write_image
        from qwen_vision_bridge.synthetic.cases import sample_image

        image = sample_image(self.pipeline.family.image_size, self.arguments.seed)
        return [write_image(self.output / "test_input.png", image, self.about())]


def mean_difference(result: Comparison) -> float:
    """Mean absolute difference of a comparison's two images, 0 to 255."""
    from qwen_vision_bridge.evaluation.metrics.pixels import mean_abs_difference

    return mean_abs_difference(result.baseline, result.enhanced)


if __name__ == "__main__":
    run(main)
