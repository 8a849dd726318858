"""Loads, evictions and restarts, counted as they happen."""

from __future__ import annotations

import dataclasses
import logging

from prometheus_client import CollectorRegistry, Counter, Histogram

from loaderd.server.errors import DrainingError, SlowConsumerError
from loaderd.server.http.metrics import catalog
from loaderd.server.http.metrics.catalog import Metric
from loaderd.server.models.events import EventBus, ModelEvent
from loaderd.server.models.lifecycle import ChangeReason, ModelState

logger = logging.getLogger(__name__)


class ModelMetrics:
    """Counts what happens to models.

    Args:
        registry: Gets the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(metric: Metric) -> Counter:
            return Counter(metric.name, metric.help, metric.labels, registry=registry)

        self._loads = counter(catalog.LOADS)
        self._unloads = counter(catalog.UNLOADS)
        self._deaths = counter(catalog.WORKER_DEATHS)
        self._restarts = counter(catalog.WORKER_RESTARTS)
        self._load_seconds = Histogram(
            catalog.LOAD_SECONDS.name,
            catalog.LOAD_SECONDS.help,
            catalog.LOAD_SECONDS.labels,
            buckets=catalog.LOAD_SECONDS.buckets,
            registry=registry,
        )

    async def follow(self, events: EventBus) -> None:
        """Counts until the daemon drains."""
        while True:
            with events.subscribe() as subscription:
                try:
                    async for event in subscription:
                        self.count(event)
                except DrainingError:
                    return
                except SlowConsumerError as error:
                    logger.error("metrics have missed changes of models: %s", error)

    def count(self, event: ModelEvent) -> None:
        """Counts one change."""
        before, now = event.previous, event.model.state
        was_loading = before is not None and before.is_loading
        if was_loading and now is ModelState.READY:
            self._loads.labels("ready").inc()
            for phase, seconds in dataclasses.asdict(event.model.timings).items():
                if seconds is not None:
                    self._load_seconds.labels(phase).observe(seconds)
        elif was_loading and now is ModelState.FAILED:
            self._loads.labels("failed").inc()
        elif was_loading and now is ModelState.UNLOADED:
            self._loads.labels("stopped").inc()
        elif event.reason is ChangeReason.WORKER_DIED or (
            before is ModelState.READY and now is ModelState.FAILED
        ):
            self._deaths.inc()
        elif before is ModelState.READY and now is ModelState.UNLOADING:
            self._unloads.labels(event.reason.value).inc()
        elif before is ModelState.FAILED and now.is_loading:
            self._restarts.inc()
