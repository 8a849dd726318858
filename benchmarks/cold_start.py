"""How long a load takes that has all at hand, beside a new Python process that does the same.

`python -m benchmarks.cold_start --model FOLDER`: LoadModel to READY with a warm standby worker, and
a process that imports transformers, loads model and tokenizer, and is ready to generate; in turns.
The exit code is 0 if the bars are met.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.figures import percentile
from benchmarks.loading import wait_for_standby
from loaderd.client import Client, LoadTimings
from tests.daemon import SpawnedDaemon

MODEL = Path(".cache/models/SmolLM2-135M-Instruct")
BAR_S = 0.5
BAR_RATIO = 8.0

_STEPS = ("resolve", "verify", "placement", "worker", "weights", "engine", "total")
_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Round:
    """One load on each side.

    Attributes:
        load_s: LoadModel to READY, as the client sees it.
        worker_cpu_s: Processor time that the worker took for it.
        script_s: The Python process, from its start to its end.
        script_cpu_s: Its processor time.
        timings: What the daemon says of the load.
    """

    load_s: float
    worker_cpu_s: float
    script_s: float
    script_cpu_s: float
    timings: LoadTimings


def measure(model: Path, rounds: int) -> list[Round]:
    """Loads in turns, after one on each side that does not count."""
    with tempfile.TemporaryDirectory(prefix="cold-start-") as folder:
        arguments = ["--allow-local", str(model.resolve().parent)]
        environment = {"LOADERD_LOG_LEVEL": "warning"}
        with (
            SpawnedDaemon(Path(folder), arguments, environment) as daemon,
            Client(daemon.address) as client,
        ):
            return [_round(daemon, client, model) for _ in range(rounds + 1)][1:]


def _round(daemon: SpawnedDaemon, client: Client, model: Path) -> Round:
    wait_for_standby(client)
    before = {worker.pid: _cpu_s(worker) for worker in daemon.workers()}
    started = time.perf_counter()
    loaded = client.load(str(model.resolve()))
    load_s = time.perf_counter() - started
    details = loaded.info.details
    if details is None:
        raise RuntimeError("a model that is READY has details")
    worker_cpu_s = _cpu_s(psutil.Process(details.worker_pid)) - before[details.worker_pid]
    loaded.unload()
    wait_for_standby(client)
    script_s, script_cpu_s = _time_script(model)
    return Round(load_s, worker_cpu_s, script_s, script_cpu_s, loaded.info.timings)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _time_script(model: Path) -> tuple[float, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(model)],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def p50(rounds: Sequence[Round], name: str) -> float:
    """The median of a figure."""
    return float(statistics.median(getattr(each, name) for each in rounds))


def is_met(rounds: Sequence[Round]) -> bool:
    """Whether the bars are."""
    ours = p50(rounds, "load_s")
    return ours <= BAR_S and p50(rounds, "script_s") >= BAR_RATIO * ours


def tables(rounds: Sequence[Round]) -> list[Table]:
    """The figures, and where the time of the loads went."""
    ours, theirs = p50(rounds, "load_s"), p50(rounds, "script_s")
    title = f"Loading a cached model, {len(rounds)} loads on each side"
    table = Table("", "loaderd", "a Python process", "ratio", "bar", title=title)
    table.add_row(
        "until ready, p50",
        f"{ours:.2f} s",
        f"{theirs:.2f} s",
        f"{theirs / ours:.1f} x",
        f"{BAR_S} s, {BAR_RATIO:.0f} x",
    )
    slowest = [max(getattr(each, name) for each in rounds) for name in ("load_s", "script_s")]
    table.add_row("the slowest", f"{slowest[0]:.2f} s", f"{slowest[1]:.2f} s", "", "")
    ours, theirs = p50(rounds, "worker_cpu_s"), p50(rounds, "script_cpu_s")
    ratio = f"{theirs / ours:.1f} x"
    table.add_row("processor time, p50", f"{ours:.2f} s", f"{theirs:.2f} s", ratio, "")
    steps = Table("step", "p50, ms", "p90, ms", title="Where the time of the loads went")
    for step in _STEPS:
        taken = [_ms(getattr(each.timings, step)) for each in rounds]
        steps.add_row(step, f"{percentile(taken, 50):.0f}", f"{percentile(taken, 90):.0f}")
    return [table, steps]


def _ms(time_taken: timedelta | None) -> float:
    return 0.0 if time_taken is None else time_taken.total_seconds() * 1000


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="its folder")
    parser.add_argument("--rounds", type=int, default=9, help="loads on each side")
    arguments = parser.parse_args()
    rounds = measure(arguments.model, arguments.rounds)
    console = Console(width=100)
    for table in tables(rounds):
        console.print(table)
    console.print("the bars are met" if is_met(rounds) else "the bars are not met")
    sys.exit(0 if is_met(rounds) else 1)


if __name__ == "__main__":
    main()
