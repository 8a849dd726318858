"""Times of requests for text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram

from loaderd.server.http.metrics import catalog
from loaderd.server.http.metrics.catalog import Metric
from loaderd.v1.generation_pb2 import StreamGenerateResponse


class GenerationMetrics:
    """Measures requests as their messages pass.

    Args:
        registry: Gets the metrics.
        clock: Tells monotonic time in seconds.

    Attributes:
        queued: Requests that wait, by model.
        running: Requests that are computed, by model.
    """

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        def histogram(metric: Metric) -> Histogram:
            return Histogram(
                metric.name,
                metric.help,
                metric.labels,
                buckets=metric.buckets,
                registry=registry,
            )

        self._clock = clock
        self.queued: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        self._models: set[str] = set()
        self._queue = histogram(catalog.QUEUE_SECONDS)
        self._first_token = histogram(catalog.FIRST_TOKEN_SECONDS)
        self._inter_token = histogram(catalog.INTER_TOKEN_SECONDS)

    async def follow(
        self, model: str, messages: AsyncIterable[StreamGenerateResponse]
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        """Passes on a request's messages, and measures when they come."""
        self._models.add(model)
        arrived = self._clock()
        latest: dict[int, float] = {}  # by completion, when its last output came
        with self._counted(model) as begin:
            async for message in messages:
                match message.WhichOneof("event"):
                    case "started":
                        begin()
                        self._queue.labels(model).observe(self._clock() - arrived)
                    case "delta":
                        now = self._clock()
                        if not latest:
                            self._first_token.labels(model).observe(now - arrived)
                        index = message.delta.index
                        if index in latest:
                            self._inter_token.labels(model).observe(now - latest[index])
                        latest[index] = now
                yield message

    def keep(self, models: Collection[str]) -> None:
        """Lets go of the series of all other models, but for those that requests still use."""
        for model in self._models.difference(models, self.queued, self.running):
            self._models.discard(model)
            for metric in (self._queue, self._first_token, self._inter_token):
                metric.remove(model)

    @contextmanager
    def _counted(self, model: str) -> Iterator[Callable[[], None]]:
        """Counts a request as one that waits, and once it begins as one that runs."""
        stage = self.queued
        stage[model] += 1

        def leave() -> None:
            stage[model] -= 1
            if not stage[model]:
                del stage[model]

        def begin() -> None:
            nonlocal stage
            leave()
            stage = self.running
            stage[model] += 1

        try:
            yield begin
        finally:
            leave()
