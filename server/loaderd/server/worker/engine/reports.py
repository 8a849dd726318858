"""When an engine tells what it does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from loaderd.server.worker.engine.batching.job import Job
from loaderd.server.worker.engine.protocol import Emit
from loaderd.worker.v1.worker_pb2 import EngineReport, Output

_INTERVAL_S = 1.0


class Tally:
    """Tokens of requests, those that have ended included."""

    def __init__(self) -> None:
        self._prompt = 0
        self._cached = 0
        self._generated = 0

    def end(self, job: Job) -> None:
        """Counts a request that had its turn, and has ended."""
        self._prompt += job.prompt_tokens
        self._cached += job.cached
        self._generated += job.generated_tokens

    def fill(self, report: EngineReport, running: Iterable[Job]) -> None:
        """Writes the sums, with those of requests that are computed now."""
        jobs = list(running)
        report.prompt_tokens = self._prompt + sum(job.prompt_tokens for job in jobs)
        report.cached_prompt_tokens = self._cached + sum(job.cached for job in jobs)
        report.generated_tokens = self._generated + sum(job.generated_tokens for job in jobs)


class Reporter:
    """Sends an engine's reports: when work begins and ends, and once a second between.

    What costs the engine something at each step is one look at the clock.

    Args:
        emit: Takes them.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._was_busy = True
        self._last = -math.inf

    def is_due(self, *, busy: bool) -> bool:
        """Whether a report is to be sent; the first one, of an engine at rest, is."""
        turned = busy != self._was_busy
        return turned or (busy and time.monotonic() >= self._last + _INTERVAL_S)

    def send(self, report: EngineReport) -> None:
        """Sends a report."""
        self._was_busy = report.running_requests > 0
        self._last = time.monotonic()
        self._emit([Output(report=report)])
