"""grpc.health.v1 for the daemon (""), each service and each model that was loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.registry import ModelRegistry

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """Keeps the health service in step with the registry.

    A model is known by its names and its id from the first time that it is READY; it is SERVING
    while a model of this name is READY. Its id is forgotten when it is gone: no other model has it.

    Attributes:
        servicer: The standard service.
    """

    def __init__(self, registry: ModelRegistry, services: Iterable[str]) -> None:
        self.servicer = _Servicer()
        self._registry = registry
        self._services = ("", *services)
        self._models: set[str] = set()
        self._ids: set[str] = set()

    async def follow(self) -> None:
        """Runs until the daemon drains."""
        for service in self._services:
            await self.servicer.set(service, SERVING)
        while not self._registry.draining:
            self._registry.changed.clear()
            await self._update()
            await self._registry.changed.wait()
        await self.servicer.enter_graceful_shutdown()

    async def _update(self) -> None:
        views = self._registry.views()
        ready = [view for view in views if view.state is ModelState.READY]
        serving = {name for view in ready for name in (*view.aliases, view.id)}
        for name in serving - self._models:
            await self.servicer.set(name, SERVING)
        for name in self._models - serving:
            await self.servicer.set(name, NOT_SERVING)
        self._models = serving
        there = {view.id for view in views}
        for model_id in self._ids - there:
            await self.servicer.forget(model_id)
        self._ids = (self._ids | {view.id for view in ready}) & there


class _Servicer(aio.HealthServicer):
    """The standard service, which can forget, and answers List as well."""

    async def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - the service's
        """The health of all that it knows."""
        known: dict[str, Any] = self._server_status  # type: ignore[attr-defined]  # no other way
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status)
            for service, status in known.items()
        }
        # Its stubs are those of a release that did not have it.
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def forget(self, service: str) -> None:
        """Knows a service no more; who watches it is told so."""
        await self.set(service, SERVICE_UNKNOWN)
        self._server_status.pop(service, None)  # type: ignore[attr-defined]  # no other way
