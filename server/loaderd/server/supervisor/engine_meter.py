"""What a worker's engine does, made of what it reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loaderd.v1.model_pb2 import ModelStatistics
from loaderd.worker.v1.worker_pb2 import EngineReport

WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class _Report:
    came: float
    counts: EngineReport


class EngineMeter:
    """Keeps an engine's latest reports, from which it tells how fast the engine is.

    While the engine works, its rate is that between its reports of the last seconds: the time
    before its work began does not count. When it has nothing to do, the rate falls to 0.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports = deque([_Report(clock(), EngineReport())])

    def note(self, counts: EngineReport) -> None:
        """Takes a report that has just come."""
        self._reports.append(_Report(self._clock(), counts))

    def read(self) -> ModelStatistics:
        """What the engine does now."""
        now = self._clock()
        latest = self._reports[-1].counts
        # A step may take longer than the window: two reports tell the rate of an engine at work.
        fewest = 2 if latest.running_requests else 1
        while len(self._reports) > fewest and self._reports[0].came < now - WINDOW_S:
            self._reports.popleft()
        first, last = self._reports[0], self._reports[-1]
        seconds = (last.came if latest.running_requests else now) - first.came

        def rate(before: int, after: int) -> float:
            return max(after - before, 0) / seconds if seconds > 0 else 0.0

        return ModelStatistics(
            running_requests=latest.running_requests,
            queued_requests=latest.queued_requests,
            prompt_tokens=latest.prompt_tokens,
            cached_prompt_tokens=latest.cached_prompt_tokens,
            generated_tokens=latest.generated_tokens,
            prompt_tokens_per_second=rate(first.counts.prompt_tokens, latest.prompt_tokens),
            generated_tokens_per_second=rate(
                first.counts.generated_tokens, latest.generated_tokens
            ),
            kv_tokens=latest.kv_tokens,
            kv_capacity_tokens=latest.kv_capacity_tokens,
        )
