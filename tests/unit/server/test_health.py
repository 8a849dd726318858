"""What the health service knows of models, as they come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loaderd.server.rpc.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health
from tests.unit.server.box import Box


@pytest.fixture
async def stub(box: Box) -> AsyncIterator[Any]:
    health = Health(box.registry, ())
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    following = asyncio.create_task(health.follow())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    following.cancel()
    await server.stop(0)


async def test_an_id_is_forgotten_with_its_model_and_a_name_is_not(box: Box, stub: Any) -> None:
    model = await box.load()
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=model.id), timeout=30)
    async for response in watch:
        if response.status == SERVING:
            break
    await box.registry.unload(model.id, force=False)
    async for response in watch:
        if response.status == SERVICE_UNKNOWN:
            break
    watch.cancel()
    assert await status(stub, str(box.folder)) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(stub, model.id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_id_of_a_model_that_may_come_back_is_kept(box: Box, stub: Any) -> None:
    model = await box.load()
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=model.id), timeout=30)
    async for response in watch:
        if response.status == SERVING:
            box.launcher.workers[0].kill()
        elif response.status == NOT_SERVING:
            break
    watch.cancel()
    assert await status(stub, model.id) == NOT_SERVING


async def test_the_list_has_all_that_a_check_knows(box: Box, stub: Any) -> None:
    model = await box.load()
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=model.id), timeout=30)
    async for response in watch:
        if response.status == SERVING:
            break
    watch.cancel()
    listed = await stub.List(health_pb2.HealthListRequest())  # type: ignore[attr-defined]
    assert {"", model.id, model.name} <= set(listed.statuses)
    for service, answer in listed.statuses.items():
        assert answer.status == await status(stub, service)


async def status(stub: Any, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    response: health_pb2.HealthCheckResponse = await stub.Check(request, timeout=30)
    return response.status
