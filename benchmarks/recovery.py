"""How soon a model is back whose worker was killed while it streamed.

`python -m benchmarks.recovery --model FOLDER`: kills the worker with SIGKILL, several times, and
tells when the last of its streams had ended and when the model was READY again. The exit code is 0
if the bars are met.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cold_start import MODEL
from benchmarks.loading import wait_for_standby
from loaderd.client import Client, Model, ModelEvent, ModelState, errors
from tests.daemon import SpawnedDaemon
from tests.waiting import until

BAR_ENDED_S = 1.0
BAR_READY_S = 3.0


@dataclass(frozen=True)
class Recovery:
    """One kill; seconds from it on.

    Attributes:
        ended_s: When the last stream had ended, with WORKER_DIED.
        ready_s: When the daemon told that the model was READY.
        load_s: What the daemon says that the load took.
    """

    ended_s: float
    ready_s: float
    load_s: float


class _Stream(threading.Thread):
    """Reads a stream until it ends, and notes how."""

    def __init__(self, model: Model, number: int) -> None:
        super().__init__(daemon=True)
        self.began = threading.Event()
        self.error: Exception | None = None
        self.ended_at = 0.0
        self._model = model
        self._number = number
        self.start()

    def run(self) -> None:
        text = f"Number {self._number} of some stories begins so:"
        try:
            with self._model.stream(text, max_new_tokens=1500, ignore_eos=True) as deltas:
                for _ in deltas:
                    self.began.set()
        except errors.LoaderdError as error:
            self.error = error
        self.ended_at = time.perf_counter()
        self.began.set()


def measure(model: Path, kills: int, streams: int) -> list[Recovery]:
    """Kills and waits, each time a model that was loaded anew: it has not died before."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        arguments = ["--allow-local", str(model.resolve().parent)]
        environment = {"LOADERD_LOG_LEVEL": "error"}
        with (
            SpawnedDaemon(Path(folder), arguments, environment) as daemon,
            Client(daemon.address) as client,
        ):
            return [_recovery(client, model, streams) for _ in range(kills)]


def _recovery(client: Client, folder: Path, count: int) -> Recovery:
    model = client.load(str(folder.resolve()), keep_alive=-1)
    streams = [_Stream(model, number) for number in range(count)]
    for stream in streams:
        stream.began.wait()
    wait_for_standby(client)
    details = model.info.details
    if details is None:
        raise RuntimeError("a model that is READY has details")
    with client.watch() as changes:
        next(changes)
        killed = time.perf_counter()
        os.kill(details.worker_pid, signal.SIGKILL)
        for change in changes:
            if isinstance(change, ModelEvent) and change.model.state is ModelState.READY:
                break
        ready = time.perf_counter()
    for stream in streams:
        stream.join()
        if not isinstance(stream.error, errors.WorkerDiedError):
            raise RuntimeError(f"a stream ended with {stream.error!r}")
    info = model.refresh()
    model.generate("It answers:", max_new_tokens=2)
    model.unload()
    until(lambda: not client.models())
    total = info.timings.total
    return Recovery(
        max(stream.ended_at for stream in streams) - killed,
        ready - killed,
        total.total_seconds() if total else 0.0,
    )


def is_met(recoveries: Sequence[Recovery]) -> bool:
    """Whether the bars are, by the slowest."""
    return (
        max(each.ended_s for each in recoveries) <= BAR_ENDED_S
        and max(each.ready_s for each in recoveries) <= BAR_READY_S
    )


def table(recoveries: Sequence[Recovery], streams: int) -> Table:
    """The figures beside their bars."""
    title = f"kill -9 of a worker with {streams} streams, {len(recoveries)} times"
    rows = Table("seconds from the kill", "median", "slowest", "bar", title=title)
    figures = {
        "all streams have ended": ([each.ended_s for each in recoveries], f"{BAR_ENDED_S:.0f} s"),
        "READY again": ([each.ready_s for each in recoveries], f"{BAR_READY_S:.0f} s"),
        "of that, its load": ([each.load_s for each in recoveries], ""),
    }
    for name, (seconds, bar) in figures.items():
        rows.add_row(name, f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}", bar)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="its folder")
    parser.add_argument("--kills", type=int, default=5, help="how often")
    parser.add_argument("--streams", type=int, default=4, help="how many run at each kill")
    arguments = parser.parse_args()
    recoveries = measure(arguments.model, arguments.kills, arguments.streams)
    console = Console(width=100)
    console.print(table(recoveries, arguments.streams))
    console.print("the bars are met" if is_met(recoveries) else "the bars are not met")
    sys.exit(0 if is_met(recoveries) else 1)


if __name__ == "__main__":
    main()
