"""What can be read at any moment: models, devices, cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from loaderd.server.http.metrics import catalog
from loaderd.server.http.metrics.catalog import Metric
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.store.listing import CacheListing
from loaderd.v1.model_pb2 import ModelStatistics
from loaderd.v1.system_pb2 import Device


@dataclass(frozen=True)
class LoadedModel:
    """What is told of a model that is loaded.

    Attributes:
        name: Its name.
        active_requests: Requests that use it.
        leases: Leases that hold it.
        memory_bytes: What its process holds.
        engine: What its engine does.
    """

    name: str
    active_requests: int
    leases: int
    memory_bytes: int
    engine: ModelStatistics


@dataclass(frozen=True)
class State:
    """The daemon at one moment.

    Attributes:
        version: Its release.
        states: The state of each model that it holds.
        models: Those that are loaded.
        queued: Requests for text that wait, by model.
        running: Requests for text that are computed, by model.
        devices: The box's; none while they are not known.
        cache: What the cache holds; None if it cannot be read.
    """

    version: str
    states: Iterable[ModelState] = ()
    models: Iterable[LoadedModel] = ()
    queued: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    devices: Iterable[Device] = ()
    cache: CacheListing | None = None


class StateCollector(Collector):
    """Writes down a state.

    Attributes:
        state: The state; set anew before each collection.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def collect(self) -> Iterator[Family]:
        """The state as gauges, and what engines have counted."""
        state = self.state
        yield _gauge(catalog.BUILD_INFO, {(state.version,): 1})
        states = Counter(each.value for each in state.states)
        yield _gauge(catalog.MODELS, {(each.value,): states[each.value] for each in _STATES})
        yield from self._models()
        yield from self._devices()
        yield from self._cache()

    def _models(self) -> Iterator[Family]:
        state = self.state

        def by_name(value: Callable[[LoadedModel], int]) -> dict[tuple[str, ...], float]:
            sums: Counter[tuple[str, ...]] = Counter()
            for model in state.models:
                sums[(model.name,)] += value(model)
            return dict(sums)

        yield _gauge(catalog.ACTIVE_REQUESTS, by_name(lambda model: model.active_requests))
        yield _gauge(catalog.LEASES, by_name(lambda model: model.leases))
        yield _gauge(catalog.WORKER_MEMORY, by_name(lambda model: model.memory_bytes))
        names = {model.name for model in state.models}
        for metric, counts in (
            (catalog.QUEUED_REQUESTS, state.queued),
            (catalog.RUNNING_REQUESTS, state.running),
        ):
            yield _gauge(metric, {(name,): counts.get(name, 0) for name in names})
        yield _counter(catalog.PROMPT_TOKENS, by_name(lambda model: model.engine.prompt_tokens))
        yield _counter(
            catalog.CACHED_PROMPT_TOKENS, by_name(lambda model: model.engine.cached_prompt_tokens)
        )
        yield _counter(
            catalog.GENERATED_TOKENS, by_name(lambda model: model.engine.generated_tokens)
        )
        yield _gauge(catalog.KV_TOKENS, by_name(lambda model: model.engine.kv_tokens))
        capacity = by_name(lambda model: model.engine.kv_capacity_tokens)
        yield _gauge(catalog.KV_CAPACITY, {name: most for name, most in capacity.items() if most})

    def _devices(self) -> Iterator[Family]:
        devices = list(self.state.devices)
        yield _gauge(catalog.DEVICE_MEMORY, {(each.id,): each.total_bytes for each in devices})
        yield _gauge(catalog.DEVICE_FREE, {(each.id,): each.free_bytes for each in devices})
        yield _gauge(catalog.DEVICE_RESERVED, {(each.id,): each.reserved_bytes for each in devices})
        yield _gauge(catalog.DEVICE_TAKEN, {(each.id,): each.taken_bytes for each in devices})

    def _cache(self) -> Iterator[Family]:
        cache = self.state.cache
        if cache is None:
            return
        yield _gauge(catalog.CACHE_BYTES, {(): cache.total_bytes})
        yield _gauge(catalog.CACHE_FREE, {(): cache.free_bytes})
        yield _gauge(catalog.CACHE_SNAPSHOTS, {(): len(cache.snapshots)})
        yield _gauge(catalog.DOWNLOADS, {(): len(cache.downloads)})
        if cache.max_bytes is not None:
            yield _gauge(catalog.CACHE_LIMIT, {(): cache.max_bytes})


_STATES = [state for state in ModelState if state is not ModelState.UNLOADED]


def _gauge(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Family:
    return _family(GaugeMetricFamily(metric.name, metric.help, labels=metric.labels), values)


def _counter(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Family:
    return _family(CounterMetricFamily(metric.name, metric.help, labels=metric.labels), values)


def _family(
    family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[tuple[str, ...], float]
) -> Family:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
