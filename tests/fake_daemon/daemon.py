"""The fake daemon: a gRPC server in this process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

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
from tests.fake_daemon.cache import Cache
from tests.fake_daemon.cache_service import CacheService
from tests.fake_daemon.downloads import Downloads
from tests.fake_daemon.generation import GenerationService
from tests.fake_daemon.models import Models, ModelService
from tests.fake_daemon.record import Seen
from tests.fake_daemon.system import SystemService

SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (model_pb2, "ModelService"),
        (cache_pb2, "CacheService"),
        (generation_pb2, "GenerationService"),
        (system_pb2, "SystemService"),
    )
]


class FakeDaemon:
    """Serves on a free port of 127.0.0.1, or on a unix socket, while its context is entered.

    Model names that it knows:

    - `demo/chat`, cached, with a chat template; `demo/base`, cached, without one
    - `demo/remote`: has to be downloaded first
    - `demo/stuck`: its load never ends by itself; `demo/stalled`: nor does its download
    - the absolute path of a folder that exists
    - `missing/model`, and any other name: MODEL_NOT_FOUND; any name `@missing`: REVISION_NOT_FOUND
    - `fail/<reason>`: fails with that reason, for example `fail/disk-full`; `fail/unknown` with
      one that no release knows

    Attributes:
        calls: What came in, oldest first.
        step_s: Seconds that each step of a load or download takes.
        token_s: Seconds that each token takes.
    """

    def __init__(self, *, unix_socket: str | None = None) -> None:
        self.calls: list[Seen] = []
        self.step_s = 0.005
        self.token_s = 0.0005
        self.stopping = threading.Event()
        self._arrival = threading.Condition()
        self.cache = Cache(self)
        self.downloads = Downloads(self.cache)
        self.health = health.HealthServicer()
        self.models = Models(self)
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=32), options=[("grpc.so_reuseport", 0)]
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self), self._server)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(CacheService(self), self._server)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self), self._server
        )
        system_pb2_grpc.add_SystemServiceServicer_to_server(
            SystemService(self.models), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        for service in ("", *SERVICES):
            self.set_health(service, serving=True)
        if unix_socket is None:
            self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        else:
            self.address = f"unix:{unix_socket}"
            self._server.add_insecure_port(self.address)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all calls and stops to listen."""
        self.stopping.set()
        self._server.stop(grace=0).wait(timeout=10)

    def seen(self, method: str, request: Message, context: grpc.ServicerContext) -> Seen:
        """Records a call."""
        call = Seen(method, request, context)
        with self._arrival:
            self.calls.append(call)
            self._arrival.notify_all()
        return call

    def last(self, method: str) -> Seen:
        """The latest call of a method; waits for the first one.

        Raises:
            TimeoutError: None came within ten seconds.
        """
        with self._arrival:
            if not self._arrival.wait_for(lambda: self._of(method), timeout=10):
                raise TimeoutError(f"no {method} came")
            return self._of(method)[-1]

    def _of(self, method: str) -> list[Seen]:
        return [call for call in self.calls if call.method == method]

    def set_health(self, service: str, *, serving: bool) -> None:
        """Sets what grpc.health.v1 says of a service."""
        status = health_pb2.HealthCheckResponse
        self.health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def pause(self, context: grpc.ServicerContext, seconds: float) -> bool:
        """Sleeps; says whether the call is still wanted."""
        time.sleep(seconds)
        return context.is_active() and not self.stopping.is_set()
