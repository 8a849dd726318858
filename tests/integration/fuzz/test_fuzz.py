"""Whatever clients send to any method: a status of ours, and a daemon that is none the worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings

from loaderd.client import Client, HealthStatus, Lease, Model, ModelState
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2
from loaderd.v1.errors_pb2 import ErrorReason
from tests.daemon import SpawnedDaemon
from tests.hub.tiny_models import build_tiny_model
from tests.integration.fuzz.messages import Known, messages

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
GROWTH_MIB = 48
"""Of the daemon and the model's worker each, by all requests after as many that warmed them up."""
CALL_S = 120


@dataclass(frozen=True)
class Target:
    """A daemon, with a model that every client may use and one that may be unloaded."""

    daemon: SpawnedDaemon
    channel: grpc.Channel
    client: Client
    lease: Lease
    other: Path

    @property
    def model(self) -> Model:
        """The model that stays."""
        return self.lease.model

    def known(self, method: MethodDescriptor) -> Known:
        """What a method's fields may name."""
        names = ["org/name", "org/name@main", "m:000000000000", str(self.other.parent)]
        if method.name in {"LoadModel", "UnloadModel"}:
            names = [*names * 3, str(self.other)]
        else:
            names = [self.model.id] * 12 + [self.model.name] * 2 + names
        return {
            "model": names,
            "models": names,
            "text": ["The sky is blue"],
            "role": ["user", "system", "assistant"],
            "ids": [1, 2, 40],
            "token_ids": [1, 2, 40],
            "service": ["", self.model.name, "loaderd.v1.ModelService"],
            "lease_id": ["0" * 32] if method.name == "ReleaseLease" else [self.lease.id],
            "ttl": [(1, 0), (86_400, 0), (86_401, 0), (0, 1), (-1, 0), (2**63 - 1, 0)],
        }

    def memory_mib(self) -> dict[str, float]:
        """What its processes hold."""
        pid = pid_of(self.model)
        held = {"daemon": self.daemon.rss_bytes}
        held["worker"] = psutil.Process(pid).memory_info().rss
        return {name: size / 2**20 for name, size in held.items()}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Target]:
    """A daemon of the test's own: offline, with a tiny model that a lease holds."""
    folder = tmp_path_factory.mktemp("fuzz")
    other = build_tiny_model(folder / "models" / "other", seed=1)
    roots = ["--allow-local", str(tiny_model), "--allow-local", str(other)]
    options = [("grpc.max_receive_message_length", -1)]
    with (
        SpawnedDaemon(folder, ["--offline", *roots]) as daemon,
        grpc.insecure_channel(daemon.address, options) as channel,
        Client(daemon.address) as client,
        client.lease(str(tiny_model), ttl=86_400) as lease,
    ):
        yield Target(daemon, channel, client, lease, other)


def test_whatever_clients_send_ends_in_a_status_of_ours(
    target: Target, pytestconfig: pytest.Config
) -> None:
    examples = pytestconfig.getoption("--fuzz-examples")
    worker_pid = pid_of(target.model)
    memory, answered = [], Counter[str]()
    for round_ in range(3):
        for path in METHODS:
            answered[path] += send(target, path, round_, examples)
            model = target.client.model(target.model.id)
            assert model.state is ModelState.READY, path
            assert pid_of(model) == worker_pid, path
            for left in target.client.models():
                if left.id != model.id:
                    left.unload(force=True)
        memory.append(target.memory_mib())
    assert target.client.health() is HealthStatus.SERVING
    # They were not all turned away at the door.
    assert [path for path in METHODS if "Generat" in path and not answered[path]] == [], answered
    for name, before in memory[1].items():
        assert memory[2][name] < before + GROWTH_MIB, (name, memory)


def pid_of(model: Model) -> int:
    """The process that serves a model."""
    assert model.details is not None
    return model.details.worker_pid


def send(target: Target, path: str, number: int, examples: int) -> int:
    """Sends requests that hypothesis makes up to one method; how many it answered."""
    method = METHODS[path]
    call = caller(target.channel, path)
    answered = []

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
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
