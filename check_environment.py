"""Check this machine: Python, packages, memory, GPUs, disk, and which model families can run and how.

Exit code 0 where some family can run, 1 where none can; each problem comes with its remedy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from qwen_vision_bridge.cli import run
from qwen_vision_bridge.environment import inspect_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0 where some family can run, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="plan for a GPU of that size instead")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    report = inspect_machine(arguments.gpu_memory)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
        return 0 if report.ok else 1
    for check in report.checks:
        mark = "ok  " if check.ok else "FAIL" if check.required else "note"
        print(f"{mark} {check.name:20} {check.found}" + ("" if check.ok else f"  → {check.remedy}"))
    for family in report.families:
        how = f"mode: {family.memory_mode} (arguments: {family.arguments})" if family.runs else "cannot run"
        print(f"{'ok  ' if family.runs else 'note'} family {family.family:13} {how}; {family.reason}")
        for line in family.plan:
            print(f"     {line}")
    print("Ready." if report.ok else "No family can run here yet: see the lines marked FAIL.")
    return 0 if report.ok else 1


if __name__ == "__main__":
    run(main)
