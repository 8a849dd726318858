"""What a load of concurrent streams came to, from when each piece of each stream arrived."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any


@dataclass
class StreamTimes:
    """One stream as its reader saw it; the times are of `time.perf_counter`, in seconds.

    Attributes:
        sent: When the request was sent.
        arrivals: When each piece of text came.
        tokens: Tokens generated, as the server counts them.
        error: Why it failed; empty if it did not.
    """

    sent: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    def arrive(self) -> None:
        """Notes that a piece came now."""
        self.arrivals.append(time.perf_counter())

    @property
    def gaps(self) -> list[float]:
        """Seconds between each two pieces."""
        return [after - before for before, after in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Figures:
    """Of streams that were sent at the same time.

    Attributes:
        streams: How many.
        tokens: How many tokens all together.
        tokens_per_second: Over the time from the first request to the last piece.
        first_token_p50: Time to first token in seconds.
        first_token_p99: As above.
        inter_token_p50: Time between two pieces of one stream in seconds; 0 if there are none.
        inter_token_p99: As above.
        errors: How many streams failed, by what they failed of.
    """

    streams: int
    tokens: int
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float
    inter_token_p99: float
    errors: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def summarize(streams: Sequence[StreamTimes]) -> Figures:
    """The figures of streams that ran together."""
    served = [stream for stream in streams if stream.arrivals and not stream.error]
    tokens = sum(stream.tokens for stream in served)
    end = max((stream.arrivals[-1] for stream in served), default=math.inf)
    first = [stream.arrivals[0] - stream.sent for stream in served]
    gaps = [gap for stream in served for gap in stream.gaps]
    return Figures(
        streams=len(streams),
        tokens=tokens,
        tokens_per_second=tokens / (end - min(stream.sent for stream in streams)),
        first_token_p50=percentile(first, 50),
        first_token_p99=percentile(first, 99),
        inter_token_p50=percentile(gaps, 50),
        inter_token_p99=percentile(gaps, 99),
        errors=dict(Counter(stream.error for stream in streams if stream.error)),
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over rounds of one load; the errors of all of them."""
    errors: Counter[str] = Counter()
    for each in rounds:
        errors.update(each.errors)
    numbers: dict[str, Any] = {
        item.name: statistics.median(getattr(each, item.name) for each in rounds)
        for item in fields(Figures)
        if item.name not in {"streams", "tokens", "errors"}
    }
    tokens = sum(each.tokens for each in rounds)
    return Figures(streams=rounds[0].streams, tokens=tokens, errors=dict(errors), **numbers)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` percent do not exceed; 0 if there is none."""
    if not values:
        return 0.0
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]
