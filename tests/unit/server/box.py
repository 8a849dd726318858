"""A daemon's insides on fake workers, reached over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import save_file

from loaderd.server.access.quotas import Quotas
from loaderd.server.addresses import TcpAddress
from loaderd.server.logs.audit import AuditLog
from loaderd.server.models.idle import IdleModels, IdleUnloader
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.restarts import Restarts
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.local import LocalCalls
from loaderd.server.rpc.server import RpcServer
from loaderd.server.store.policy import ModelPolicy
from loaderd.server.store.store import ModelStore, StoreSettings
from loaderd.server.supervisor.offload_folders import OffloadFolders
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits
from loaderd.server.tracing.spans import Tracer
from loaderd.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2_grpc,
)
from tests.fake_worker import FakeLauncher

MAX_REQUESTS = 4


@dataclass
class Box:
    """A daemon's insides, and stubs that reach them over TCP."""

    launcher: FakeLauncher
    registry: ModelRegistry
    loads: Loads
    folder: Path
    tcp: str
    socket: str
    models: Any
    generation: Any
    system: Any
    local: LocalCalls
    url: str = ""

    async def load(
        self, folder: Path | None = None, replicas: int | None = None
    ) -> model_pb2.Model:
        request = model_pb2.LoadModelRequest(model=str(folder or self.folder), replicas=replicas)
        load = self.models.LoadModel(request, timeout=30)
        try:
            async for message in load:
                last = message
        finally:
            load.cancel()  # gRPC may go on with a call whose reader was cancelled
        model: model_pb2.Model = last.model
        return model

    def stream(self, text: str, model: str = "", timeout: float = 30) -> Any:
        request = generation_pb2.StreamGenerateRequest(model=model or str(self.folder), text=text)
        return self.generation.StreamGenerate(request, timeout=timeout)

    async def list(self) -> list[model_pb2.Model]:
        return list((await self.models.ListModels(model_pb2.ListModelsRequest())).models)


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


@asynccontextmanager
async def open_box(
    tmp_path: Path,
    on_demand: OnDemand = OnDemand.OFF,
    keep_alive_s: float = PINNED,
    restart_wait_s: float | None = None,
    access: Access | None = None,
    user_loads: OnDemand = OnDemand.ANY,
    policy: ModelPolicy | None = None,
    http: bool = False,
    audit: AuditLog | None = None,
    tracer: Tracer | None = None,
) -> AsyncIterator[Box]:
    """The insides with a model folder beside them; models come back only with a wait for it.

    Args:
        tmp_path: Where its files go.
        on_demand: Which models a request loads.
        keep_alive_s: How long models stay.
        restart_wait_s: Seconds before a model comes back for the second time; None: never.
        access: Who may do what; None: everybody everything.
        user_loads: Which models users load.
        policy: Which models are allowed; None: all.
        http: Whether it also listens for HTTP.
        audit: Told what administrators do.
        tracer: Gets spans.
    """
    async with AsyncExitStack() as stack:
        launcher = FakeLauncher()
        limits = WorkerLimits(
            standby=1, load_timeout=20, heartbeat_timeout=60, max_stream_bytes=1 << 18
        )
        supervisor = Supervisor(tmp_path, launcher, limits)
        store = ModelStore(
            StoreSettings(
                cache_dir=tmp_path / "cache",
                local_roots=(tmp_path,),
                hub_endpoint="http://127.0.0.1:1",
                hub_token=None,
                offline=True,
                stall_timeout=20,
                policy=policy or ModelPolicy(),
            )
        )
        registry = ModelRegistry(MAX_REQUESTS, keep_alive_s)
        disk = OffloadFolders(tmp_path / "disk")
        planner = Planner(store, supervisor, IdleModels(registry), disk)
        loads = Loads(registry, store, supervisor, planner, on_demand, user_loads=user_loads)
        restarts = Restarts(loads, restart_wait_s or 0.0, tracer)
        if restart_wait_s is not None:
            registry.on_death = restarts.begin
        service = None
        if http:
            from loaderd.server.http.listener import HttpListener
            from loaderd.server.http.service import HttpService

            listener = HttpListener(TcpAddress("127.0.0.1", 0))
            service = HttpService(listener, registry, planner, store, supervisor, tracer=tracer)
        access = access or Access(None, Quotas(time.monotonic))
        server = RpcServer(
            registry,
            loads,
            planner,
            store,
            supervisor,
            access=access,
            observer=None if service is None else service.metrics,
            audit=audit,
            tracer=tracer,
        )
        port = server.bind("127.0.0.1:0")
        socket = f"unix:{tmp_path / 'box.sock'}"
        server.bind(socket)
        idle = asyncio.create_task(IdleUnloader(registry).run())
        await supervisor.start()
        await server.start()
        if service is not None:
            service.start(server.local)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        yield Box(
            launcher,
            registry,
            loads,
            make_model(tmp_path / "model"),
            f"127.0.0.1:{port}",
            socket,
            model_pb2_grpc.ModelServiceStub(channel),
            generation_pb2_grpc.GenerationServiceStub(channel),
            system_pb2_grpc.SystemServiceStub(channel),
            server.local,
            "" if service is None else service.url,
        )
        idle.cancel()
        await restarts.close()
        await registry.drain(0)
        await registry.close()
        await store.close()
        if service is not None:
            await service.stop(0)
        await server.stop(0)
        await supervisor.close()


async def reason_of(call: Any) -> str:
    """The reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # it has what a Call has
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)
