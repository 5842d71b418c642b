"""Processor time of every command's help, of mistakes, and of shell completion.

    python benchmarks/startup.py [--turns 3] [--output FILE.json]

Reported: user and system seconds of each, the smallest of the turns, each in a process of its own; the goal is 1.5.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GOAL = 1.5
OTHERS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "misspelt command": ["discovr"],
    "misspelt option of ours": ["train", "sft", "--top_kk", "1"],
    "misspelt option of TRL's": ["train", "sft", "--gradient_chekpointing", "true"],
    "value that cannot be used": ["train", "dpo", "--tau", "2"],
    "completion of a command": ["__complete", "train", "s"],
    "completion of an option": ["__complete", "train", "sft", "--le"],
}


def processor_seconds(argv: Sequence[str]) -> float:
    """User and system seconds of `sails` with these words."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    command = [sys.executable, "-m", "sails_align", *argv]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return spent() - before


def measure(turns: int) -> dict[str, Any]:
    """The seconds of everything, and the slowest of them."""
    from sails_align.cli import COMMANDS

    calls = {**OTHERS, **{f"{name} --help": [*name.split(), "--help"] for name in COMMANDS.names()}}
    seconds = {name: round(min(processor_seconds(argv) for _ in range(turns)), 3) for name, argv in calls.items()}
    return {"goal": GOAL, "turns": turns, "slowest": max(seconds.values()), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = measure(options.turns)
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)
    if found["slowest"] > GOAL:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
