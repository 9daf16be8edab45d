"""Train or calibrate a bridge between frozen models.

    uv run python train_bridge.py --models miniature --method perceive --output_dir bridge
    uv run accelerate launch train_bridge.py --models qwen --method perceive --train_data_dir data --dry-run

Without data of your own it trains on the synthetic world. `--dry-run` prints the models that a run would load
and their memory, and downloads nothing. Every flag may be written with hyphens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_vision_bridge import cli as commands
from qwen_vision_bridge.training.cli import parse, run_config_of, settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Check the flags, then print the plan or train."""
    arguments = parse(sys.argv[1:] if argv is None else argv, __doc__)
    settings = settings_of(arguments)
    run = run_config_of(arguments)
    if arguments.dry_run:
        from qwen_vision_bridge.training.memory_plan import plan

        print(plan(run, settings))
        return 0
    from qwen_vision_bridge.training.run import train

    train(
        run,
        settings,
        arguments.resume_from_checkpoint,
        mixed_precision=arguments.mixed_precision,
        report_to=arguments.report_to,
    )
    return 0


if __name__ == "__main__":
    commands.run(main)
