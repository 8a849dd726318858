"""What a client sees of handlers that fail in every way there is."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from loaderd.server.access.quotas import Quotas
from loaderd.server.errors import ModelNotFoundError
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.admission import Admission
from loaderd.server.rpc.clients import Clients
from loaderd.server.rpc.interceptor import CallInterceptor
from loaderd.v1 import model_pb2, model_pb2_grpc

SECRET = "the text of an exception"


class Failing(model_pb2_grpc.ModelServiceServicer):
    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Any
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=await self._answer(request.model))

    async def LoadModel(  # noqa: N802
        self, request: model_pb2.LoadModelRequest, context: Any
    ) -> AsyncIterator[model_pb2.LoadModelResponse]:
        yield model_pb2.LoadModelResponse()
        yield model_pb2.LoadModelResponse(model=await self._answer(request.model))

    async def _answer(self, how: str) -> model_pb2.Model:
        match how:
            case "domain":
                raise ModelNotFoundError(model="org/name")
            case "defect":
                raise ZeroDivisionError(SECRET)
            case "cancelled":
                raise asyncio.CancelledError
            case "stop":
                raise StopAsyncIteration
        return model_pb2.Model(name=how)


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(
        interceptors=[CallInterceptor(Admission(Access(None, Quotas(time.monotonic)), Clients()))]
    )
    model_pb2_grpc.add_ModelServiceServicer_to_server(
        Failing(),  # type: ignore[abstract]  # the other methods are not called
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def failure(channel: grpc.aio.Channel, how: str, streaming: bool) -> grpc.aio.AioRpcError:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if streaming:
            async for _ in stub.LoadModel(model_pb2.LoadModelRequest(model=how), timeout=20):
                pass
        else:
            await stub.GetModel(model_pb2.GetModelRequest(model=how), timeout=20)
    return caught.value


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_domain_error_arrives_with_its_details(
    channel: grpc.aio.Channel, streaming: bool
) -> None:
    error = await failure(channel, "domain", streaming)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what a Call has
    assert {detail.TypeName() for detail in status.details} == {
        "google.rpc.ErrorInfo",
        "google.rpc.ResourceInfo",
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["defect", "cancelled", "stop"])
async def test_a_defect_is_internal_and_tells_nothing(
    channel: grpc.aio.Channel, how: str, streaming: bool
) -> None:
    error = await failure(channel, how, streaming)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "incident" in (error.details() or "")
    assert SECRET not in str(error)


async def test_bytes_that_are_no_message_are_refused_and_the_connection_lives(
    channel: grpc.aio.Channel,
) -> None:
    raw: Any = channel.unary_unary("/loaderd.v1.ModelService/GetModel")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(b"\xff\xff\xff\xff", timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stub = model_pb2_grpc.ModelServiceStub(channel)
    answer = await stub.GetModel(model_pb2.GetModelRequest(model="fine"), timeout=20)
    assert answer.model.name == "fine"


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    raw: Any = channel.unary_unary("/loaderd.v1.ModelService/NoSuchMethod")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
