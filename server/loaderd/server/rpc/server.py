"""The public gRPC server: services, interceptor, settings."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loaderd.server.logs.audit import AuditLog
from loaderd.server.models.loads import Loads
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.admission import Admission
from loaderd.server.rpc.bounds import MESSAGE_BYTES
from loaderd.server.rpc.cache_service import CacheService
from loaderd.server.rpc.call_counter import CallCounter
from loaderd.server.rpc.clients import Clients
from loaderd.server.rpc.generation_service import GenerationService
from loaderd.server.rpc.health import Health
from loaderd.server.rpc.interceptor import CallInterceptor
from loaderd.server.rpc.local import LocalCalls
from loaderd.server.rpc.model_service import ModelService
from loaderd.server.rpc.observer import Observer
from loaderd.server.rpc.reflection import add_reflection
from loaderd.server.rpc.system_service import SystemService
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.tracing.spans import Tracer
from loaderd.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second daemon on the port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # A ping that comes late, when its call has just ended, is no offence: on a busy box three of
    # them would end the connection, and whatever runs on it by then.
    ("grpc.keepalive_permit_without_calls", 1),
    # Who connects and then says nothing is not waited for as long as gRPC would: two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
)


class RpcServer:
    """Everything that clients reach.

    Attributes:
        health: The health service; its `follow` is to be run.
        local: The same services, for calls from inside the daemon.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        loads: Loads,
        planner: Planner,
        store: ModelStore,
        supervisor: Supervisor,
        *,
        access: Access,
        observer: Observer | None = None,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        clients = Clients()
        admission = Admission(access, clients, audit)
        counters = [] if observer is None else [CallCounter(observer)]
        interceptor = CallInterceptor(admission, tracer)
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=[*counters, interceptor])
        models = ModelService(registry, loads, planner)
        model_pb2_grpc.add_ModelServiceServicer_to_server(models, self._server)
        cache = CacheService(registry, store)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(cache, self._server)
        generation = GenerationService(registry, loads, access.quotas, observer)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._server)
        system = SystemService(registry, supervisor, planner, store, clients)
        system_pb2_grpc.add_SystemServiceServicer_to_server(system, self._server)
        servicers = {
            file.DESCRIPTOR.services_by_name[name].full_name: servicer
            for file, name, servicer in (
                (model_pb2, "ModelService", models),
                (cache_pb2, "CacheService", cache),
                (generation_pb2, "GenerationService", generation),
                (system_pb2, "SystemService", system),
            )
        }
        self.local = LocalCalls(servicers, admission)
        services = list(servicers)
        self.health = Health(registry, services)
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self._server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        add_reflection(self._server, (*services, health_name))

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Binds `host:port` or `unix:path`; the port that it got.

        Args:
            address: Where to listen.
            credentials: Of TLS; None listens in the clear.

        Raises:
            RuntimeError: The address cannot be bound.
        """
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Serves."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuses new calls, cuts those that still run after `grace` seconds."""
        await self._server.stop(grace)
