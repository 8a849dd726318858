"""`python -m benchmarks.soak`: many random requests, and what daemon and worker keep of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.soak.soak import AT_ONCE, Report, soak
from tests.hub.tiny_models import build_tiny_model


def tables(report: Report) -> list[Table]:
    """The report as people read it."""
    ends = Table("", "requests", title="How they ended")
    for outcome, count in report.outcomes.ended.most_common():
        ends.add_row(outcome, str(count))
    for defect, count in report.outcomes.defects.most_common():
        ends.add_row(f"DEFECT: {defect}", str(count))
    left = Table("", "before", "after", "", title="What is left")
    for each in report.figures:
        left.add_row(each.what, str(each.before), str(each.after), "LEAKS" if each.leaks else "")
    return [ends, left]


def main() -> None:
    """Soaks and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder (default: a tiny random one)")
    parser.add_argument("--requests", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--warm-up", type=int, default=1000, help="before those (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or build_tiny_model(Path(folder) / "tiny-llama")
        console.print(f"{options.requests} requests, {AT_ONCE} at once, seed {options.seed}")
        begin = time.monotonic()
        report = asyncio.run(
            soak(model.absolute(), options.requests, warm_up=options.warm_up, seed=options.seed)
        )
    for table in tables(report):
        console.print(table)
    for line in report.complaints:
        console.print(f"the log: {line}", markup=False)
    console.print(f"exit code {report.exit_code}, {time.monotonic() - begin:.0f} s")
    sys.exit(0 if report.is_clean else 1)


if __name__ == "__main__":
    main()
