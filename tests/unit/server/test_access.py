"""Each role and each method, of every service that the daemon serves; and how callers are known."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from loaderd.server.access.caller import Caller, Limits
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.command import create_token
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import PERMISSIONS, Role, may_call
from loaderd.server.errors import ClientLimitError
from loaderd.server.models.loads import OnDemand, outcome
from loaderd.server.models.record import LoadOptions
from loaderd.server.rpc.access import Access
from loaderd.v1 import model_pb2
from tests.unit.server.box import Box, open_box

CLIENTS = (Role.ADMIN, Role.USER, Role.MONITOR)
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class Entry:
    """A daemon that knows clients, and the tokens of one for each role."""

    def __init__(self, box: Box, file: Path, tokens: dict[Role, str]) -> None:
        self.box = box
        self.file = file
        self.tokens = tokens

    async def outcome(
        self, method: str, token: str | None, address: str | None = None
    ) -> tuple[grpc.StatusCode, dict[str, str]]:
        """Calls a method with an empty request; the status of its first answer, and its reason."""
        metadata = [("authorization", f"Bearer {token}")] if token else []
        return await call(address or self.box.tcp, method, metadata)


async def call(
    address: str, method: str, metadata: list[tuple[str, str]]
) -> tuple[grpc.StatusCode, dict[str, str]]:
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        # On the wire all kinds of methods are the same: messages there, messages back.
        ask: Any = channel.stream_stream(method)
        answers = ask(iter([b""]), metadata=metadata, timeout=30)
        try:
            async for _ in answers:
                break
            return grpc.StatusCode.OK, {}
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            info = error_details_pb2.ErrorInfo()
            if status is not None and status.details[0].Unpack(info):
                fields = dict(info.metadata)
                assert fields.pop("request_id")
                return error.code(), {"reason": info.reason, **fields}
            return error.code(), {}
        finally:
            answers.cancel()


@asynccontextmanager
async def entry_of(tmp_path: Path, **options: Any) -> AsyncIterator[Entry]:
    file = tmp_path / "clients.toml"
    tokens = {role: create_token(file, f"some-{role}", role, None) for role in CLIENTS}
    socket_role = options.pop("socket_role", Role.ADMIN)
    access = Access(ClientsFile(file), Quotas(time.monotonic), socket_role)
    async with open_box(tmp_path, access=access, **options) as box:
        yield Entry(box, file, tokens)


@pytest.fixture
async def entry(tmp_path: Path) -> AsyncIterator[Entry]:
    async with entry_of(tmp_path) as entry:
        yield entry


async def served_methods(entry: Entry) -> set[str]:
    """The paths of all methods, as reflection tells them."""
    metadata = [("authorization", f"Bearer {entry.tokens[Role.MONITOR]}")]
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(entry.box.tcp) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        async for answer in stub.ServerReflectionInfo(iter([request]), metadata=metadata):
            names = [service.name for service in answer.list_services_response.service]
    pool = descriptor_pool.Default()
    return {
        f"/{name}/{method.name}"
        for name in names
        for method in pool.FindServiceByName(name).methods
    }


async def test_the_table_has_every_method_that_is_served_and_no_other(entry: Entry) -> None:
    assert set(PERMISSIONS) == await served_methods(entry)


@pytest.mark.parametrize("role", Role)
async def test_each_role_is_let_through_or_not_as_the_table_says(entry: Entry, role: Role) -> None:
    found = {}
    for method in PERMISSIONS:
        code, info = await entry.outcome(method, entry.tokens.get(role))
        refused = info.get("reason") in {"UNAUTHENTICATED", "FORBIDDEN"}
        found[method] = not refused
        if refused:
            action = f"call {method[1:].replace('/', '.')}"
            assert (code, info) == (
                (grpc.StatusCode.UNAUTHENTICATED, {"reason": "UNAUTHENTICATED"} | problem(info))
                if role is Role.ANONYMOUS
                else (
                    grpc.StatusCode.PERMISSION_DENIED,
                    {"reason": "FORBIDDEN", "client": f"some-{role}", "role": role}
                    | {"action": action},
                )
            )
    assert found == {method: role in roles for method, roles in PERMISSIONS.items()}


def problem(info: dict[str, str]) -> dict[str, str]:
    assert "token" in info["problem"]
    return {"problem": info["problem"]}


def test_what_each_role_is_for() -> None:
    """What the table must say whatever else changes in it."""
    models, cache = "/loaderd.v1.ModelService", "/loaderd.v1.CacheService"
    generate = "/loaderd.v1.GenerationService/Generate"
    for method in (
        f"{models}/UnloadModel",
        f"{cache}/DownloadModel",
        f"{cache}/DeleteSnapshots",
        f"{cache}/PruneCache",
        "/loaderd.v1.SomeService/ThatIsNewAndNotInTheTable",
    ):
        assert [role for role in Role if may_call(role, method)] == [Role.ADMIN]
    assert may_call(Role.USER, generate)
    assert not may_call(Role.MONITOR, generate)
    assert [m for m in PERMISSIONS if may_call(Role.ANONYMOUS, m)] == [
        "/grpc.health.v1.Health/Check"
    ]


LIST = "/loaderd.v1.ModelService/ListModels"
UNLOAD = "/loaderd.v1.ModelService/UnloadModel"


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer ")],
        [("authorization", "Basic dTpw")],
        [("authorization", "loaderd_x")],
        [("authorization", "Bearer loaderd_wrong")],
        [("authorization", "Bearer a"), ("authorization", "Bearer b")],
    ],
)
async def test_credentials_that_are_none(entry: Entry, headers: list[tuple[str, str]]) -> None:
    code, info = await call(entry.box.tcp, LIST, headers)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "loaderd_wrong" not in str(info)


async def test_a_wrong_token_is_refused_where_none_would_do(entry: Entry) -> None:
    for address in (entry.box.tcp, entry.box.socket):
        code, _ = await entry.outcome("/grpc.health.v1.Health/Check", "loaderd_wrong", address)
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_that_is_taken_out_of_the_file_ends_with_the_next_call(entry: Entry) -> None:
    token = entry.tokens[Role.USER]
    assert (await entry.outcome(LIST, token))[0] is grpc.StatusCode.OK
    before = entry.file.read_text()
    entry.file.write_text("")
    assert (await entry.outcome(LIST, token))[0] is grpc.StatusCode.UNAUTHENTICATED
    entry.file.write_text(before.replace('role = "user"', 'role = "admin"'))
    assert (await entry.outcome(UNLOAD, token))[1]["reason"] == "INVALID_NAME"
    new = create_token(entry.file, "new", "monitor", timedelta(days=1))
    assert (await entry.outcome(LIST, new))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("text", ["clients = 3", "[[clients]]\nname = 'x'\n", "[", None])
async def test_a_file_that_goes_wrong_changes_nothing_and_the_log_says_so_once(
    entry: Entry, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if text is None:
        entry.file.unlink()
    else:
        entry.file.write_text(text)
    for _ in range(3):
        code, _ = await entry.outcome(LIST, entry.tokens[Role.USER])
        assert code is grpc.StatusCode.OK
    assert caplog.text.count("those stay clients who were") == 1


async def test_a_token_expires(tmp_path: Path) -> None:
    file = tmp_path / "clients.toml"
    token = create_token(file, "ann", "user", timedelta(hours=1))
    now = datetime.now(UTC)
    access = Access(ClientsFile(file, lambda: now), Quotas(time.monotonic))
    async with open_box(tmp_path, access=access) as box:
        entry = Entry(box, file, {})
        assert (await entry.outcome(LIST, token))[0] is grpc.StatusCode.OK
        now += timedelta(hours=1)
        code, info = await entry.outcome(LIST, token)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert info["problem"] == "the token has expired"


async def test_who_comes_over_the_socket_has_the_sockets_role(tmp_path: Path) -> None:
    async with entry_of(tmp_path, socket_role=Role.MONITOR) as entry:
        socket = entry.box.socket
        assert (await entry.outcome(LIST, None, socket))[0] is grpc.StatusCode.OK
        assert (await entry.outcome(UNLOAD, None, socket))[1]["role"] == "monitor"
        token = entry.tokens[Role.ADMIN]
        assert (await entry.outcome(UNLOAD, token, socket))[1]["reason"] == "INVALID_NAME"


async def test_without_a_file_of_clients_whoever_connects_may_do_everything(box: Box) -> None:
    for address in (box.tcp, box.socket):
        for headers in ([], [("authorization", "Bearer loaderd_for_another_daemon")]):
            _, info = await call(address, UNLOAD, headers)
            assert info["reason"] == "INVALID_NAME"


async def test_the_log_tells_who_was_refused_what_and_no_token(
    entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await entry.outcome(UNLOAD, entry.tokens[Role.USER])
    await entry.outcome(UNLOAD, "loaderd_wrong")
    assert "refused /loaderd.v1.ModelService/UnloadModel from ipv4:127.0.0.1" in caplog.text
    assert "'some-user' has the role user" in caplog.text
    for token in (*entry.tokens.values(), "loaderd_wrong"):
        assert token not in caplog.text


@pytest.mark.parametrize(
    ("user_loads", "allowed"),
    [(OnDemand.OFF, False), (OnDemand.CACHED, True), (OnDemand.ANY, True)],
)
async def test_what_users_may_load(tmp_path: Path, user_loads: OnDemand, allowed: bool) -> None:
    async with entry_of(tmp_path, user_loads=user_loads, on_demand=OnDemand.ANY) as entry:
        user = load_request(entry, Role.USER, str(entry.box.folder))
        assert (await user == "READY") is allowed
        hub = await load_request(entry, Role.USER, "org/name")
        # Which is offline: who may download is told so.
        assert (hub == "OFFLINE_NOT_CACHED") is (user_loads is OnDemand.ANY)
        assert await load_request(entry, Role.ADMIN, str(entry.box.folder)) == "READY"
        # What is loaded is theirs to ask for, whoever loaded it.
        assert await load_request(entry, Role.USER, str(entry.box.folder)) == "READY"


async def test_users_scale_what_they_have_loaded(tmp_path: Path) -> None:
    async with entry_of(tmp_path, user_loads=OnDemand.ANY, on_demand=OnDemand.ANY) as entry:
        model = str(entry.box.folder)
        assert await load_request(entry, Role.ADMIN, model) == "READY"
        assert await load_request(entry, Role.USER, model, replicas=2) == "FORBIDDEN"
        assert await load_request(entry, Role.USER, model, replicas=1) == "READY", "as it is"
        assert await load_request(entry, Role.ADMIN, model, replicas=2) == "READY"
        await entry.box.registry.unload(model, force=False)
        assert await load_request(entry, Role.USER, model) == "READY"
        assert await load_request(entry, Role.USER, model, replicas=2) == "READY"


async def test_each_replica_counts_towards_a_clients_limit_of_models(box: Box) -> None:
    caller = Caller("some-user", Role.USER, Limits(models=2))

    async def scale(replicas: int) -> int:
        loading = box.loads.load(str(box.folder), LoadOptions(), caller, replicas)
        return (await outcome(loading)).replicas.wanted

    with pytest.raises(ClientLimitError):
        await scale(3)
    assert box.launcher.loads == 0
    assert [await scale(replicas) for replicas in (2, 1)] == [2, 1]
    with pytest.raises(ClientLimitError):
        await scale(3)
    assert await scale(2) == 2


async def load_request(entry: Entry, role: Role, model: str, replicas: int | None = None) -> str:
    """READY, or the reason for which the load failed."""
    request = model_pb2.LoadModelRequest(model=model, replicas=replicas)
    metadata = [("authorization", f"Bearer {entry.tokens[role]}")]
    load = entry.box.models.LoadModel(request, timeout=30, metadata=metadata)
    try:
        async for message in load:
            last = message
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        assert status is not None
        assert status.details[0].Unpack(info)
        return str(info.reason)
    return model_pb2.ModelState.Name(last.model.state).removeprefix("MODEL_STATE_")
