"""Bytes that are no message, to every method: a status of ours, and nothing breaks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loaderd.client import Client, HealthStatus, ModelState
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2
from tests.daemon import SpawnedDaemon

METHODS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming)
    for file in (cache_pb2, generation_pb2, model_pb2, system_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
OTHERS = [("/grpc.health.v1.Health/Check", False), ("/grpc.health.v1.Health/Watch", True)]
REFLECTION = [
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    for version in ("v1", "v1alpha")
]
NO_MESSAGE = b"\xff\xff\xff\xff"


@pytest.fixture
def channel(shared_daemon: SpawnedDaemon) -> Iterator[Any]:
    with grpc.insecure_channel(shared_daemon.address) as channel:
        yield channel
    with Client(shared_daemon.address) as client:
        assert client.health() is HealthStatus.SERVING


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code()
    assert isinstance(code, grpc.StatusCode)
    return code


@pytest.mark.parametrize(("method", "streaming"), METHODS + OTHERS)
def test_no_message_is_invalid(channel: Any, method: str, streaming: bool) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        if streaming:
            list(channel.unary_stream(method)(NO_MESSAGE, timeout=20))
        else:
            channel.unary_unary(method)(NO_MESSAGE, timeout=20)
    assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", REFLECTION)
def test_no_message_in_a_stream_is_invalid(channel: Any, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(method)(iter([NO_MESSAGE]), timeout=20))
    assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT


def test_random_bytes_never_end_in_an_undocumented_status(channel: Any) -> None:
    documented = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
    }
    unary = [method for method, streaming in METHODS if not streaming]
    for _ in range(20):
        for method in unary:
            error = channel.unary_unary(method).future(os.urandom(24), timeout=60).exception()
            assert error is None or code_of(error) in documented, method


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
def test_a_request_that_only_the_daemon_can_read_leaves_the_worker_alive(
    channel: Any, shared_daemon: SpawnedDaemon, tiny_model: Path, method: str
) -> None:
    with Client(shared_daemon.address) as client:
        model = client.load(str(tiny_model))
        call = channel.unary_unary(f"/loaderd.v1.GenerationService/{method}")
        refused = 0
        for depth in range(94, 101):
            # Groups in groups, of a field that no message has; and the model, and a text.
            nested = b"\xa3\x3e" * depth + b"\xa4\x3e" * depth
            text = {"Generate": b"\x1a\x01x", "Tokenize": b"\x12\x01x"}[method]
            name = model.id.encode()
            error = call.future(b"\x0a%c%b" % (len(name), name) + text + nested).exception()
            assert error is None or code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
            refused += error is not None and "request: is nested too deep" in str(error)
        assert refused
        assert client.model(model.id).state is ModelState.READY
        assert model.tokenize("x").token_ids
        model.unload()
