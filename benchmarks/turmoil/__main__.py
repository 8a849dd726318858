"""`python -m benchmarks.turmoil`: models on one box, in nobody's way, whatever is done to them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.turmoil.turmoil import AT_ONCE, Report, turmoil
from tests.hub.tiny_models import build_tiny_model


def table(report: Report) -> Table:
    """How things ended, as people read it."""
    ends = Table("", "times", title="What clients did, and how it ended")
    for outcome, count in sorted(report.outcomes.ended.items()):
        ends.add_row(outcome, str(count))
    ends.add_row("workers killed", str(report.outcomes.kills))
    return ends


def main() -> None:
    """Makes turmoil and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turmoil", description=__doc__)
    parser.add_argument("--model", type=Path, action="append", help="folder; more than once")
    parser.add_argument("--seconds", type=float, default=600, help="how long (600)")
    parser.add_argument("--kill-every", type=float, default=10, help="seconds, the mean (10)")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do (0)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        models = [model.absolute() for model in options.model or []]
        models += [
            build_tiny_model(Path(folder, f"tiny-{number}"), seed=number)
            for number in range(len(models), 3)
        ]
        console.print(f"{len(models)} models, {AT_ONCE} clients, {options.seconds:.0f} s")
        report = turmoil(
            models, options.seconds, kill_every_s=options.kill_every, seed=options.seed
        )
    console.print(table(report))
    before, after = report.before_bytes / 2**20, report.after_bytes / 2**20
    console.print(f"memory before {before:.0f} MiB, after {after:.0f} MiB")
    for problem in report.problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
