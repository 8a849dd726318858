"""The seam: deadlines, cancellation, connections; seen from the daemon."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from loaderd.client import AsyncClient, Client, HealthStatus, LoadProgress, errors
from loaderd.v1 import generation_pb2, model_pb2
from tests.fake_daemon import FakeDaemon, Seen

WAIT_S = 10.0
LONG: dict[str, Any] = {"max_new_tokens": 50_000, "ignore_eos": True}


def deadline(call: Seen) -> int | None:
    """The deadline that a call came with, to the next ten seconds; None: it had none."""
    left = call.time_remaining
    if left is None or left > 1e6:  # gRPC says a very long time
        return None
    return round(left / 10) * 10


def test_unary_calls_have_the_clients_deadline(daemon: FakeDaemon) -> None:
    with Client(daemon.address) as client:
        client.models()
        client.models(timeout=300)
        client.models(timeout=math.inf)
    with Client(daemon.address, timeout=200) as client:
        client.models()
    with Client(daemon.address, timeout=None) as client:
        client.models()

    assert [deadline(call) for call in daemon.calls] == [60, 300, None, 200, None]


def test_streams_and_generations_have_none_unless_given(daemon: FakeDaemon, client: Client) -> None:
    for timeout in (None, 300):
        model = client.load("demo/remote", timeout=timeout)
        model.generate("x", max_new_tokens=1, timeout=timeout)
        list(model.stream("x", max_new_tokens=1, timeout=timeout))
        client.cache.download("demo/remote", timeout=timeout)
        client.cache.verify("demo/remote", timeout=timeout)
        with client.watch(timeout=timeout) as watch:
            next(watch)

    assert [deadline(call) for call in daemon.calls] == [None] * 6 + [300] * 6


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_a_deadline_that_is_none_is_refused(client: Client, timeout: float) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="timeout"):
        client.info(timeout=timeout)
    with pytest.raises(errors.InvalidArgumentError, match="timeout"):
        client.load("demo/chat", timeout=timeout)


def test_a_stream_that_nobody_holds_is_cancelled(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")
    stream = model.stream("x", **LONG)
    next(stream)

    del stream
    gc.collect()

    assert daemon.last("StreamGenerate").cancelled.wait(WAIT_S)


def test_a_stream_that_was_never_read_is_cancelled_too(daemon: FakeDaemon, client: Client) -> None:
    operation = client.start_load("demo/stuck")
    load = daemon.last("LoadModel")

    del operation
    gc.collect()

    assert load.cancelled.wait(WAIT_S)


def test_a_stalled_download_is_cancelled(daemon: FakeDaemon, client: Client) -> None:
    with client.cache.start_download("demo/stalled") as operation:
        assert next(operation).total_bytes

    assert daemon.last("DownloadModel").cancelled.wait(WAIT_S)
    with pytest.raises(errors.CallCancelledError):
        operation.result()


def test_a_stuck_load_is_cancelled_from_another_thread(daemon: FakeDaemon, client: Client) -> None:
    operation = client.start_load("demo/stuck")
    next(operation)
    threading.Timer(0.05, operation.cancel).start()

    with pytest.raises(errors.CallCancelledError):
        operation.result()
    assert daemon.last("LoadModel").cancelled.wait(WAIT_S)


@contextmanager
def interrupted(daemon: FakeDaemon, method: str) -> Iterator[None]:
    """Expects to be interrupted as by Ctrl-C while waiting for a call that the daemon has seen."""

    def interrupt() -> None:
        daemon.last(method)
        time.sleep(0.2)  # until the main thread waits for the answer
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        yield
    thread.join(WAIT_S)


def test_ctrl_c_in_generate_cancels_it(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")

    with interrupted(daemon, "Generate"):
        model.generate("x", **LONG)

    assert daemon.last("Generate").cancelled.wait(WAIT_S)


def test_ctrl_c_while_waiting_for_an_item_cancels_the_stream(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.step_s = 1.0
    operation = client.start_load("demo/stuck")

    with interrupted(daemon, "LoadModel"):
        for _ in operation:
            pass

    assert daemon.last("LoadModel").cancelled.wait(WAIT_S)


def test_ctrl_c_at_any_moment_lets_the_client_close(daemon: FakeDaemon) -> None:
    """gRPC's default streams do not: they wait forever for a call that nobody ends."""
    armed = False

    def interrupt_once(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt_once)
    try:
        for attempt in range(60):
            with Client(daemon.address) as client:
                timer = threading.Timer(attempt / 20_000, signal.raise_signal, [signal.SIGINT])
                armed = True
                with pytest.raises(KeyboardInterrupt):
                    timer.start()
                    list(client.start_load("demo/stuck", timeout=WAIT_S))
                timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


async def test_a_cancelled_task_cancels_its_calls(daemon: FakeDaemon) -> None:
    async with AsyncClient(daemon.address) as client:
        model = await client.load("demo/chat")

        async def read() -> None:
            async for _ in model.stream("x", **LONG):
                pass

        for work, method in ((model.generate("x", **LONG), "Generate"), (read(), "StreamGenerate")):
            task = asyncio.ensure_future(work)
            call = await asyncio.to_thread(daemon.last, method)

            task.cancel()

            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(call.cancelled.wait, WAIT_S)


async def test_an_asyncio_timeout_is_one(daemon: FakeDaemon) -> None:
    async with AsyncClient(daemon.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.load("demo/stuck")
        cancelled = daemon.last("LoadModel").cancelled
        assert await asyncio.to_thread(cancelled.wait, WAIT_S)


async def test_an_asyncio_stream_dropped_in_another_thread_is_cancelled(
    daemon: FakeDaemon,
) -> None:
    async with AsyncClient(daemon.address) as client:
        model = await client.load("demo/chat")
        holder = [model.stream("x", **LONG)]
        await anext(holder[0])

        await asyncio.to_thread(holder.clear)

        cancelled = daemon.last("StreamGenerate").cancelled
        assert await asyncio.to_thread(cancelled.wait, WAIT_S)


async def test_on_progress_may_be_a_coroutine_function(daemon: FakeDaemon) -> None:
    seen: list[LoadProgress] = []

    async def remember(progress: LoadProgress) -> None:
        await asyncio.sleep(0)
        seen.append(progress)

    async with AsyncClient(daemon.address) as client:
        await client.load("demo/chat", on_progress=remember)
    assert seen


def test_an_asyncio_client_may_be_made_outside_a_loop(daemon: FakeDaemon) -> None:
    client = AsyncClient(daemon.address)

    async def use() -> HealthStatus:
        async with client:
            return await client.health()

    assert asyncio.run(use()) is HealthStatus.SERVING


async def test_closing_an_unused_asyncio_client_is_fine() -> None:
    client = AsyncClient("127.0.0.1:1")
    await client.close()

    with pytest.raises(RuntimeError, match="closed"):
        await client.info()


def test_one_client_serves_many_threads(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")

    def ask(number: int) -> str:
        return model.generate(messages=[{"role": "user", "content": str(number)}]).text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))

    assert answers == [f"[1] you said: {number}" for number in range(24)]


def test_a_client_finds_a_daemon_that_was_restarted(tmp_path: Any) -> None:
    socket = str(tmp_path / "s")
    with Client(socket) as client:
        with FakeDaemon(unix_socket=socket):
            assert client.info().version
        with pytest.raises(errors.DaemonUnreachableError):
            client.info()
        with FakeDaemon(unix_socket=socket):
            pause = threading.Event()
            for _ in range(200):
                try:
                    assert client.info().version
                    return
                except errors.DaemonUnreachableError:
                    pause.wait(0.05)
            pytest.fail("the client did not find it again")


def test_the_stubs_are_there_for_what_is_not_wrapped(client: Client) -> None:
    response = client.raw.models.ListModels(model_pb2.ListModelsRequest())

    assert list(response.models) == []


async def test_the_asyncio_stubs_too(daemon: FakeDaemon) -> None:
    async with AsyncClient(daemon.address) as client:
        response = await client.raw.models.ListModels(model_pb2.ListModelsRequest())
    assert list(response.models) == []


def test_answers_may_be_larger_than_grpc_allows_by_itself(client: Client) -> None:
    text = "a" * 1_500_000

    tokens = client.load("demo/chat").tokenize(text)  # 6 MB; the limit would be 4 MiB

    assert "".join(tokens.tokens) == text


class _Silent(grpc.GenericRpcHandler):
    """A server that ends every stream with the messages given, and nothing else."""

    def __init__(self, *messages: Any) -> None:
        self._messages = messages

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            return (message.SerializeToString() for message in self._messages)

        return grpc.unary_stream_rpc_method_handler(answer)


@pytest.mark.parametrize(
    ("messages", "call"),
    [
        ((), lambda client: client.load("demo/chat")),
        ((), lambda client: client.cache.download("demo/chat")),
        (
            (
                generation_pb2.StreamGenerateResponse(
                    started=generation_pb2.GenerationStarted(request_id="r")
                ),
            ),
            lambda client: list(_model(client).stream("x")),
        ),
        (
            (generation_pb2.StreamGenerateResponse(finished=generation_pb2.GenerationFinished()),),
            lambda client: list(_model(client).stream("x")),
        ),
    ],
)
def test_a_stream_that_breaks_off_is_no_success(messages: tuple[Any, ...], call: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_Silent(*messages)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client, pytest.raises(errors.UnexpectedAnswerError):
            call(client)
    finally:
        server.stop(0).wait(WAIT_S)


def _model(client: Client) -> Any:
    from loaderd.client import Model
    from loaderd.client.responses import model_info

    return Model(client._transport, model_info(model_pb2.Model(id="m-1")))
