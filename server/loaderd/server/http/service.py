"""The HTTP listener of a daemon, with what it needs of it."""

from __future__ import annotations

import asyncio

from loaderd.server.http.app import build_app
from loaderd.server.http.listener import HttpListener
from loaderd.server.http.metrics.metrics import Metrics
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc.local import LocalCalls
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.tracing.spans import Tracer


class HttpService:
    """Metrics from the daemon's first call on, and the listener that tells them.

    Args:
        listener: The address, which is bound already.
        registry: Has the models.
        planner: Knows the devices.
        store: Has the cache.
        supervisor: Has the workers.
        tracer: Gets the spans of requests; None: nobody asked.

    Attributes:
        metrics: To be told of all calls.
    """

    def __init__(
        self,
        listener: HttpListener,
        registry: ModelRegistry,
        planner: Planner,
        store: ModelStore,
        supervisor: Supervisor,
        *,
        tracer: Tracer | None = None,
    ) -> None:
        self._listener = listener
        self._registry = registry
        self._tracer = tracer
        self.metrics = Metrics(registry, planner, store, supervisor)
        self._following: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._listener.url

    def start(self, calls: LocalCalls) -> None:
        """Serves.

        Args:
            calls: Reaches the daemon's services.
        """
        self._following = asyncio.create_task(self.metrics.follow())
        app = build_app(
            calls,
            self.metrics,
            lambda: self._registry.draining,
            self._listener.is_own_host,
            self._listener.has_room,
            tracer=self._tracer,
        )
        self._listener.start(app)

    async def stop(self, grace_s: float) -> None:
        """Refuses new connections, and cuts requests that still run after `grace_s` seconds."""
        if self._following is not None:
            self._following.cancel()
        await self._listener.stop(grace_s)
