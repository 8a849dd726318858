"""What names a call: in its answer, its errors and the log."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loaderd.v1 import generation_pb2, model_pb2, system_pb2
from tests.unit.server.box import Box

HEADER = "x-request-id"


def named(request_id: str) -> tuple[tuple[str, str], ...]:
    return ((HEADER, request_id),)


async def trailer(call: Any) -> str:
    return str(dict(await call.trailing_metadata())[HEADER])


async def failure(call: Any) -> tuple[grpc.StatusCode, dict[str, str], str]:
    """Of a call that fails: its code, the metadata of its ErrorInfo, and its name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    pairs: Any = caught.value.trailing_metadata()
    return caught.value.code(), dict(info.metadata), str(dict(pairs)[HEADER])


async def test_every_answer_ends_with_its_name(box: Box) -> None:
    mine = box.system.GetServerInfo(system_pb2.GetServerInfoRequest(), metadata=named("mine"))
    await mine
    assert await trailer(mine) == "mine"
    made = [box.models.ListModels(model_pb2.ListModelsRequest()) for _ in range(2)]
    for call in made:
        await call
    names = {await trailer(call) for call in made}
    assert len(names) == 2
    assert all(names)


async def test_a_generation_has_one_name_wherever_it_comes_from(box: Box) -> None:
    await box.load()
    request = generation_pb2.GenerateRequest(model=str(box.folder), text="count 1")
    by_header = box.generation.Generate(request, metadata=named("header 1"))
    assert (await by_header).request_id == await trailer(by_header) == "header 1"
    request.request_id = "field-1"
    by_field = box.generation.Generate(request)
    assert (await by_field).request_id == await trailer(by_field) == "field-1"
    by_both = box.generation.Generate(request, metadata=named("field-1"))
    assert (await by_both).request_id == "field-1"
    _, metadata, name = await failure(box.generation.Generate(request, metadata=named("other")))
    assert metadata["field"] == HEADER
    assert name == metadata["request_id"]

    stream = box.stream("count 1")
    events = [event async for event in stream]
    assert events[0].started.request_id == await trailer(stream)


async def test_an_error_has_its_name(box: Box) -> None:
    request = model_pb2.GetModelRequest(model="org/none")
    code, metadata, name = await failure(box.models.GetModel(request, metadata=named("mine")))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert metadata["request_id"] == name == "mine"


@pytest.mark.parametrize("bad", ["x" * 129, "", "a\tb"])
async def test_what_is_no_name_is_refused_and_named_by_the_daemon(box: Box, bad: str) -> None:
    request = generation_pb2.GenerateRequest(model=str(box.folder), text="x", request_id=bad)
    code, metadata, name = await failure(box.generation.Generate(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata["field"] == "request_id"
    assert name == metadata["request_id"] != bad


async def test_a_long_header_is_refused_and_so_are_two(box: Box) -> None:
    request = system_pb2.GetServerInfoRequest()
    for given in (named("x" * 129), named("a") + named("b")):
        code, metadata, _ = await failure(box.system.GetServerInfo(request, metadata=given))
        assert (code, metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, HEADER)


async def test_the_log_tells_how_a_call_has_ended(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    request = model_pb2.UnloadModelRequest(model="org/none")
    await failure(box.models.UnloadModel(request, metadata=named("mine")))
    await box.list()  # who only looks is not told of at this level
    calls = [vars(each) for each in caplog.records if each.name == "loaderd.server.rpc.call"]
    (line,) = calls
    assert line["message"] == "/loaderd.v1.ModelService/UnloadModel MODEL_NOT_LOADED"
    assert (line["code"], line["reason"]) == ("FAILED_PRECONDITION", "MODEL_NOT_LOADED")
    assert line["model"] == "org/none"
    assert line["peer"].startswith("ipv4:127.0.0.1")
    assert line["duration"] >= 0
