"""Lets clients and accidents happen to simulated boxes, and tells how everything ended.

The boxes differ in their devices, their spare workers and what they load on demand; time, memory
and workers are simulated, everything between them is the daemon's own. After every event it is
checked that no memory is promised twice, that nothing goes that is used, and more
(tests/simulation); each box ends with nothing loaded and nothing left. The exit code is 1 if
anything was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from loaderd.server.models.loads import OnDemand
from tests.simulation.accidents import Accidents
from tests.simulation.hardware import INVENTORIES
from tests.simulation.simulation import Simulation

_EACH = 1000
"""Events of one box, before the next one."""


@dataclass
class Report:
    """What came of a run.

    Attributes:
        ended: How calls ended, by what they did and how.
        boxes: How many were simulated.
        happened: Events.
        changes: Of the models' states.
        seconds: That it all took.
        problems: What was wrong, with the box and the seed that show it.
    """

    ended: Counter[str] = field(default_factory=Counter)
    boxes: int = 0
    happened: int = 0
    changes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def simulate(events: int, seed: int, each: int = _EACH) -> Report:
    """Simulates one box after the other.

    Args:
        events: How many of all boxes together.
        seed: Of the first box; each further one has the next.
        each: Events of one box.
    """
    report, began = Report(), time.perf_counter()
    kinds = itertools.cycle(itertools.product(OnDemand, (1, 0, 2), INVENTORIES))
    for begun in range(0, events, each):
        on_demand, standby, inventory = next(kinds)
        number, count = seed + report.boxes, min(each, events - begun)
        report.boxes += 1
        try:
            with Simulation(inventory, number, standby, on_demand) as box:
                accidents = Accidents(box, number)
                for _ in range(count):
                    report.happened += 1
                    accidents.happen()
            report.ended += box.ended
            report.changes += box.events
        except (AssertionError, RuntimeError) as error:
            kind = f"{inventory}, {standby} spares, on demand {on_demand.value}"
            report.problems.append(f"seed {number} ({kind}), event {report.happened}: {error}")
    report.seconds = time.perf_counter() - began
    return report


def main() -> None:
    """Simulates and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--events", type=int, default=10_000, help="of all boxes (10000)")
    parser.add_argument("--each", type=int, default=_EACH, help=f"of one box ({_EACH})")
    parser.add_argument("--seed", type=int, default=1, help="of the first box (1)")
    options = parser.parse_args()
    report = simulate(options.events, options.seed, options.each)
    table = Table("", "times", title="What clients did, and how it ended")
    for outcome, count in sorted(report.ended.items()):
        table.add_row(outcome, str(count))
    console = Console()
    console.print(table)
    console.print(
        f"{report.happened} events on {report.boxes} boxes, {report.changes} changes of models, "
        f"{report.seconds:.0f} s, {report.happened / report.seconds:.0f} events/s"
    )
    for problem in report.problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
