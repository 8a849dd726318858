"""Every failure as a typed error, with nothing lost on the way."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from loaderd.client import AsyncClient, Client, LoaderdError, errors
from loaderd.client.status import CallContext, error_from_rpc
from loaderd.server import errors as server_errors
from loaderd.v1 import model_pb2
from loaderd.v1.errors_pb2 import ErrorReason
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.failure import REASONS, REQUEST_ID, RETRY_AFTER_S

REASON_NAMES = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()[1:]]


def fail_name(reason: str) -> str:
    return f"fail/{reason.lower().replace('_', '-')}"


def check(error: LoaderdError, reason: str) -> None:
    expected = REASONS[reason]
    assert type(error) is errors.BY_REASON[reason]
    assert type(error).__name__ == server_errors.BY_REASON[reason].__name__
    assert error.reason == reason
    assert error.code.value[0] == expected.code
    assert error.metadata == expected.metadata
    assert error.retry_after == (RETRY_AFTER_S if expected.retry else None)
    assert error.request_id == REQUEST_ID
    assert str(error).startswith(reason.lower().replace("_", " "))
    for name, value in expected.metadata.items():
        assert str(getattr(error, name)) == value


@pytest.mark.parametrize("reason", REASON_NAMES)
def test_every_reason_comes_back_as_its_class(client: Client, reason: str) -> None:
    with pytest.raises(LoaderdError) as from_stream:
        client.load(fail_name(reason))
    with pytest.raises(LoaderdError) as from_call:
        client.cache.resolve(fail_name(reason))

    check(from_stream.value, reason)
    check(from_call.value, reason)


@pytest.mark.parametrize("reason", REASON_NAMES)
async def test_every_reason_comes_back_from_the_asyncio_client(
    daemon: FakeDaemon, reason: str
) -> None:
    async with AsyncClient(daemon.address) as client:
        with pytest.raises(LoaderdError) as from_stream:
            await client.load(fail_name(reason))
        with pytest.raises(LoaderdError) as from_call:
            await client.cache.resolve(fail_name(reason))

    check(from_stream.value, reason)
    check(from_call.value, reason)


def test_there_is_a_class_for_each_reason_and_no_other() -> None:
    assert set(errors.BY_REASON) == set(REASON_NAMES)


@pytest.mark.parametrize("reason", REASON_NAMES)
def test_the_codes_are_those_of_the_classes(reason: str) -> None:
    assert errors.BY_REASON[reason].code.value[0] == REASONS[reason].code


def test_a_reason_of_a_newer_daemon_keeps_everything(client: Client) -> None:
    with pytest.raises(LoaderdError) as caught:
        client.load("fail/unknown")

    assert type(caught.value) is LoaderdError
    assert caught.value.reason == "INVENTED_LATER"
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert caught.value.metadata == {"colour": "blue"}
    assert caught.value.retry_after == RETRY_AFTER_S


def test_numbers_are_numbers(client: Client) -> None:
    with pytest.raises(errors.DiskFullError) as full:
        client.load("fail/disk-full")
    with pytest.raises(errors.ModelInUseError) as busy:
        client.load("fail/model-in-use")

    assert (full.value.needed_bytes, full.value.free_bytes) == (5_000_000_000, 17)
    assert busy.value.active_requests == 3


def test_a_field_that_did_not_come_is_none() -> None:
    error = errors.DiskFullError("full", metadata={"needed_bytes": "many"})

    assert error.needed_bytes is None
    assert error.free_bytes is None
    assert errors.ModelNotFoundError("gone").model is None


def test_bad_values_are_value_errors_too() -> None:
    for kind in (
        errors.InvalidNameError,
        errors.InvalidArgumentError,
        errors.UnsupportedOptionError,
    ):
        assert issubclass(kind, ValueError)


def test_no_daemon_says_where_and_what_to_do() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.DaemonUnreachableError) as caught:
        client.info()

    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.reason == ""
    for part in ("127.0.0.1:1", "`loaderd`", "LOADERD_ADDRESS"):
        assert part in str(caught.value)


def test_a_request_that_grpc_refuses_has_no_reason(client: Client) -> None:
    model = client.load("demo/chat")

    with pytest.raises(LoaderdError) as caught:
        model.tokenize("a" * 5 * 1024 * 1024)

    assert type(caught.value) is LoaderdError
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")


def test_a_stream_without_a_daemon_says_so_too() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.DaemonUnreachableError):
        client.load("demo/chat")


def test_a_daemon_that_goes_away_ends_its_streams(daemon: FakeDaemon, client: Client) -> None:
    watch = client.watch()
    next(watch)

    daemon.stop()

    # Which one depends on how far the daemon gets before its connections are gone.
    expected = (errors.DrainingError, errors.DaemonUnreachableError, errors.CallCancelledError)
    with pytest.raises(expected):
        list(watch)


class _Lost(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_the_own_request_id_is_in_the_error() -> None:
    error = error_from_rpc(_Lost(), CallContext("box:1", None, "mine"))

    assert isinstance(error, errors.DaemonUnreachableError)
    assert error.request_id == "mine"


class _BreaksOff(grpc.GenericRpcHandler):
    """A server that says one thing on every stream, and then fails without a reason."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield model_pb2.WatchModelsResponse(snapshot=model_pb2.ModelList()).SerializeToString()
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

        return grpc.unary_stream_rpc_method_handler(answer)


@pytest.fixture
def breaks_off() -> Iterator[str]:
    """The address of a server whose connections are lost in mid-stream."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_BreaksOff()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait(10)


def test_a_connection_lost_in_mid_stream_is_said_to_be(breaks_off: str) -> None:
    with Client(breaks_off) as client:
        watch = client.watch()
        next(watch)
        with pytest.raises(errors.DaemonUnreachableError) as caught:
            next(watch)

    assert str(caught.value).startswith(f"the connection to the loaderd daemon at {breaks_off} was")
    assert "Socket closed" not in str(caught.value)
    assert "Socket closed" in str(caught.value.__cause__)  # for who looks at the traceback


class _NamesItself(grpc.GenericRpcHandler):
    """A server that fails without a reason, and tells what the call was named."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        metadata: Any = details.invocation_metadata
        name = dict(metadata)["x-request-id"]

        def fail(request: bytes, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNKNOWN, name)

        if details.method.endswith("WatchModels"):
            return grpc.unary_stream_rpc_method_handler(fail)
        return grpc.unary_unary_rpc_method_handler(fail)


@pytest.fixture
def names_itself() -> Iterator[str]:
    """The address of a server whose errors' texts are the names that calls came with."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_NamesItself()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait(10)


async def test_each_call_has_a_name_of_its_own_that_its_error_tells(names_itself: str) -> None:
    caught = []
    with Client(names_itself) as client:
        for call in (client.models, lambda: next(client.watch())):
            with pytest.raises(LoaderdError) as error:
                call()
            caught.append(error.value)
    async with AsyncClient(names_itself) as aclient:
        for acall in (aclient.models, lambda: anext(aclient.watch())):
            with pytest.raises(LoaderdError) as error:
                await acall()
            caught.append(error.value)

    assert [error.request_id for error in caught] == [str(error) for error in caught]
    assert len({str(error) for error in caught}) == 4


async def test_a_connection_lost_in_mid_stream_of_the_asyncio_client(breaks_off: str) -> None:
    async with AsyncClient(breaks_off) as client:
        watch = client.watch()
        await anext(watch)
        with pytest.raises(errors.DaemonUnreachableError, match="was lost"):
            await anext(watch)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.CANCELLED, errors.CallCancelledError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.UnexpectedAnswerError),
        (grpc.StatusCode.UNKNOWN, LoaderdError),
    ],
)
@pytest.mark.parametrize("details", [None, b"\xff\xff garbage"])
def test_failures_that_no_daemon_explained(
    code: grpc.StatusCode, kind: type[LoaderdError], details: bytes | None
) -> None:
    class Bare(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return code

        def details(self) -> str:
            return "what gRPC says"

        def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:  # type: ignore[override] # grpc's stubs hide the pairs
            return () if details is None else (("grpc-status-details-bin", details),)

    error = error_from_rpc(Bare(), CallContext("box:1", 3.0, "mine"))

    assert type(error) is kind
    assert error.code is code
    assert error.metadata == {}
    assert str(error)


def test_errors_survive_pickling(client: Client) -> None:
    with pytest.raises(errors.QueueFullError) as caught:
        client.load("fail/queue-full")

    copy = pickle.loads(pickle.dumps(caught.value))

    assert type(copy) is errors.QueueFullError
    assert str(copy) == str(caught.value)
    assert (copy.code, copy.reason, copy.metadata, copy.retry_after) == (
        caught.value.code,
        caught.value.reason,
        caught.value.metadata,
        caught.value.retry_after,
    )
