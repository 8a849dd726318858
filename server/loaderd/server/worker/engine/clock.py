"""Where the time of a request went."""

from __future__ import annotations

import time
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from loaderd.v1.generation_pb2 import GenerationTimings


@dataclass
class Clock:
    """Monotonic times of one request, in seconds; None for what did not happen.

    Attributes:
        arrived: When it came.
        turn: When its computation began.
        first: When its first token was there.
        last: When its last token so far was there.
    """

    arrived: float
    turn: float | None = None
    first: float | None = None
    last: float | None = None

    def token(self) -> None:
        """Notes a token."""
        self.last = time.monotonic()
        self.first = self.last if self.first is None else self.first

    def timings(self) -> GenerationTimings:
        """As clients see them."""
        turn = time.monotonic() if self.turn is None else self.turn
        timings = GenerationTimings(queue=_duration(turn - self.arrived))
        if self.first is not None and self.last is not None:
            timings.prefill.CopyFrom(_duration(self.first - turn))
            timings.decode.CopyFrom(_duration(self.last - self.first))
            timings.time_to_first_token.CopyFrom(_duration(self.first - self.arrived))
        return timings


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
