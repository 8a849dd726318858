"""All metrics of one daemon."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from loaderd.server.http.metrics import catalog
from loaderd.server.http.metrics.generation import GenerationMetrics
from loaderd.server.http.metrics.models import ModelMetrics
from loaderd.server.http.metrics.state import LoadedModel, State, StateCollector
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.v1.generation_pb2 import StreamGenerateResponse


class Metrics:
    """What a scrape gets; an observer of all calls.

    Args:
        registry: Has the models.
        planner: Knows the devices.
        store: Has the cache.
        supervisor: Knows whether a worker has looked at the devices.
    """

    def __init__(
        self, registry: ModelRegistry, planner: Planner, store: ModelStore, supervisor: Supervisor
    ) -> None:
        # They would be a second series for each, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        self._planner = planner
        self._store = store
        self._supervisor = supervisor
        self._series = CollectorRegistry()
        ProcessCollector(registry=self._series)
        self._state = StateCollector(State(version("loaderd")))
        self._series.register(self._state)
        self._generation = GenerationMetrics(self._series)
        self._models = ModelMetrics(self._series)
        self._rpc, self._http = (
            Counter(each.name, each.help, each.labels, registry=self._series)
            for each in (catalog.RPC_REQUESTS, catalog.HTTP_REQUESTS)
        )

    async def follow(self) -> None:
        """Counts what happens to models, until the daemon drains."""
        await self._models.follow(self._registry.events)

    def called(self, method: str, code: str) -> None:
        """See `Observer.called`."""
        self._rpc.labels(method, code).inc()

    def generating(
        self, model: str, messages: AsyncIterable[StreamGenerateResponse]
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        """See `Observer.generating`."""
        return self._generation.follow(model, messages)

    def answered(self, route: str, status: int) -> None:
        """Counts a request over HTTP.

        Args:
            route: The route that it took.
            status: The status that it got.
        """
        self._http.labels(route, str(status)).inc()

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as they are now.

        Args:
            accept: The formats that the client takes, as in the header of this name.

        Returns:
            The text, and its content type.
        """
        # Only once a worker has looked at them: a scrape must neither wait for one nor start one.
        devices = await self._planner.devices() if self._supervisor.versions else []
        cache = await self._store.snapshots()
        records = self._registry.records()
        loaded = [
            LoadedModel(
                name=str(record.name),
                active_requests=record.active_requests,
                leases=len(self._registry.leases.of(record.id)),
                memory_bytes=record.replicas.memory_bytes,
                engine=record.replicas.statistics(),
            )
            for record in records
            if record.state is ModelState.READY
        ]
        self._generation.keep({model.name for model in loaded})
        self._state.state = State(
            version=version("loaderd"),
            states=[record.state for record in records],
            models=loaded,
            queued=self._generation.queued,
            running=self._generation.running,
            devices=devices,
            cache=cache,
        )
        encode, content_type = choose_encoder(accept)
        return encode(self._series), content_type
