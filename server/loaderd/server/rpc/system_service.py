"""loaderd.v1.SystemService."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import grpc

from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc.clients import Clients
from loaderd.server.rpc.convert_cache import duration
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.v1 import system_pb2, system_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

VERSION = version("loaderd")

CAPABILITIES = (
    "cache.delete",
    "cache.download",
    "cache.prune",
    "cache.resolve",
    "cache.verify",
    "generation.chat",
    "generation.stream",
    "models.leases",
    "models.load_on_demand",
    "models.placement",
    "models.plan",
    "models.replicas",
    "models.statistics",
    "models.watch",
)
"""Optional abilities that clients may ask for before they rely on them."""


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """The daemon and the box that it runs on."""

    def __init__(
        self,
        registry: ModelRegistry,
        supervisor: Supervisor,
        planner: Planner,
        store: ModelStore,
        clients: Clients,
    ) -> None:
        self._registry = registry
        self._supervisor = supervisor
        self._planner = planner
        self._store = store
        self._clients = clients
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: system_pb2.GetServerInfoRequest, context: Context
    ) -> system_pb2.GetServerInfoResponse:
        """Version, uptime, settings, abilities."""
        info = system_pb2.GetServerInfoResponse(
            version=VERSION,
            uptime=duration(time.monotonic() - self._started),
            pid=os.getpid(),
            cache_dir=str(self._store.settings.cache_dir),
            local_roots=map(str, self._store.settings.local_roots),
            hub_endpoint=self._store.settings.hub_endpoint,
            offline=self._store.settings.offline,
            draining=self._registry.draining,
            standby_workers=self._supervisor.standby_workers,
            versions={"python": platform.python_version(), **self._supervisor.versions},
            capabilities=CAPABILITIES,
            active_requests=self._registry.active_requests,
            clients=self._clients.count(),
        )
        info.started_at.FromDatetime(self._started_at)
        return info

    async def ListDevices(
        self, request: system_pb2.ListDevicesRequest, context: Context
    ) -> system_pb2.ListDevicesResponse:
        """Accelerators, then the CPU."""
        return system_pb2.ListDevicesResponse(devices=await self._planner.devices())
