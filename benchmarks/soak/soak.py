"""A daemon, a load of random requests, and what is left of them afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak.footprint import Figure, Witness
from benchmarks.soak.load import Load, Outcomes
from loaderd.client import AsyncClient
from tests.daemon import SpawnedDaemon

AT_ONCE = 100
_MAX_REQUESTS = 96
"""Fewer than come at once, so that some find the queue full."""
_GROWTH_MIB = {"daemon": 16, "worker": 64}
COMPLAINTS = ("Traceback", "incident", "was never retrieved", "was destroyed", "never awaited")
"""What a log has of work that went wrong or was forgotten."""


@dataclass(frozen=True)
class Report:
    """What a soak came to.

    Attributes:
        outcomes: Of the requests.
        figures: What daemon and worker held, before and after; empty if there are defects.
        complaints: Lines of the daemon's log, its workers' included, that tell of defects.
        exit_code: The daemon's, when it was told to stop.
    """

    outcomes: Outcomes
    figures: Sequence[Figure]
    complaints: Sequence[str]
    exit_code: int

    @property
    def is_clean(self) -> bool:
        """Whether every request ended as it may, and nothing is left of any."""
        leaks = any(each.leaks for each in self.figures)
        return not (self.outcomes.defects or leaks or self.complaints or self.exit_code)


async def soak(model: Path, requests: int, *, warm_up: int, seed: int = 0) -> Report:
    """Soaks a daemon of its own.

    Args:
        model: Folder of the model.
        requests: How many.
        warm_up: How many before those, after which the processes are as large as they get.
        seed: Of the requests.

    Raises:
        RuntimeError: Requests failed in the warm-up.
    """
    arguments = ["--standby", "0", "--max-requests", str(_MAX_REQUESTS)]
    arguments += ["--allow-local", str(model.parent)]
    variables = {"LOADERD_LOG_LEVEL": "info"}
    with (
        tempfile.TemporaryDirectory() as folder,
        SpawnedDaemon(Path(folder), arguments, variables) as daemon,
    ):
        async with AsyncClient(daemon.address) as client:
            loaded = await client.load(str(model))
            (worker,) = daemon.workers()
            processes = {"daemon": psutil.Process(daemon.process.pid), "worker": worker}
            load = Load(client, loaded, seed)
            witness = Witness(loaded, processes, _GROWTH_MIB)
            warmed_up = await load.run(warm_up, AT_ONCE)
            if warmed_up.defects:
                raise RuntimeError(f"requests failed: {dict(warmed_up.defects)}")
            await witness.look()
            outcomes = await load.run(requests, AT_ONCE)
            # After a defect there may be nothing to look at, such as a worker.
            figures = [] if outcomes.defects else await witness.look_again()
        exit_code = daemon.stop()
        lines = daemon.log.splitlines()
    complaints = [line for line in lines if any(each in line for each in COMPLAINTS)]
    return Report(outcomes, figures, complaints, exit_code)
