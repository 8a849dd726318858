"""Whatever clients send to any method: a status of ours, and a daemon that is none the worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from hypothesis import given, seed, settings

from loaderd.client import HealthStatus
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2
from loaderd.v1.errors_pb2 import ErrorReason
from tests.integration.fuzz.messages import messages
from tests.integration.fuzz.target import DRAWN, Target, check_growth

FILES = (system_pb2, cache_pb2, model_pb2, generation_pb2, health_pb2, reflection_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS[REFLECTION.replace("v1alpha", "v1")] = METHODS[REFLECTION]
ENDLESS = {"/loaderd.v1.ModelService/WatchModels", "/grpc.health.v1.Health/Watch"}
REASONS = {name.removeprefix("ERROR_REASON_") for name, _ in ErrorReason.items()} - {"INTERNAL"}
LARGEST_REQUEST = 4 * 1024 * 1024
CALL_S = 120


def test_whatever_clients_send_ends_in_a_status_of_ours(
    target: Target, pytestconfig: pytest.Config
) -> None:
    examples = pytestconfig.getoption("--fuzz-examples")
    worker_pid = target.worker_pid()
    memory, answered = [], Counter[str]()
    for round_ in range(3):
        for path in METHODS:
            answered[path] += send(target, path, round_, examples)
            assert target.worker_pid() == worker_pid, path
            target.unload_others()
        memory.append(target.memory_mib())
    assert target.client.health() is HealthStatus.SERVING
    # They were not all turned away at the door.
    assert [path for path in METHODS if "Generat" in path and not answered[path]] == [], answered
    check_growth(memory[1], memory[2])


def send(target: Target, path: str, number: int, examples: int) -> int:
    """Sends requests that hypothesis makes up to one method; how many it answered."""
    method = METHODS[path]
    call = caller(target.channel, path)
    answered = []

    @seed(number)
    @settings(DRAWN, max_examples=examples)
    @given(messages(method.input_type, target.known(method)))
    def once(request: Message) -> None:
        try:
            call(request)
        except grpc.RpcError as error:
            check_status(error, path, request)
        else:
            answered.append(path)

    once()
    return len(answered)


def caller(channel: grpc.Channel, path: str) -> Callable[[Message], None]:
    """A function that makes one call and reads it to its end, or, where it has none, begins to."""
    method = METHODS[path]
    kind: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    make = kind(
        path,
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )

    def call(request: Message) -> None:
        if not method.server_streaming:
            make(request, timeout=CALL_S)
            return
        answers = make(iter([request]) if method.client_streaming else request, timeout=CALL_S)
        if path in ENDLESS:
            next(answers)
            answers.cancel()
        else:
            list(answers)

    return call


def check_status(error: Any, path: str, request: Message) -> None:
    """Fails unless a call ended in a documented status, with its details."""
    code = error.code()
    shown = f"{path}: {code}: {error.details()}"
    if request.ByteSize() > LARGEST_REQUEST and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return  # gRPC itself does not read it
    status = rpc_status.from_call(error)
    if status is None:
        assert path == "/grpc.health.v1.Health/Check", shown
        assert code is grpc.StatusCode.NOT_FOUND, shown
        return
    info = ErrorInfo()
    assert status.details[0].Unpack(info), shown
    assert info.domain == "loaderd", shown
    assert info.reason in REASONS, shown
    assert code not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}, shown
