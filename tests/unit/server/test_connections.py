"""What whoever connects can do to the daemon before, or without, a call."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from loaderd.server.errors import LoaderdError
from loaderd.server.rpc import server
from loaderd.server.rpc.local import LocalCall
from loaderd.v1.generation_pb2 import StreamGenerateRequest
from loaderd.v1.generation_pb2_grpc import GenerationServiceStub
from tests.unit.server.box import MAX_REQUESTS, Box, open_box
from tests.waiting import until_in_loop

MANY = 10_000
METHOD = "loaderd.v1.GenerationService/StreamGenerate"


async def test_who_connects_and_says_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(server._OPTIONS) | {"grpc.server_handshake_timeout_ms": 200}
    monkeypatch.setattr(server, "_OPTIONS", tuple(options.items()))
    async with open_box(tmp_path) as box:
        await box.load()
        for sent in (b"", b"PRI * HTTP/2.0\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", box.tcp.rpartition(":")[2])
            writer.write(sent)
            async with asyncio.timeout(20):
                await reader.read()  # to its end
            writer.close()
        assert [text async for text in box.stream("count 1")]


async def test_ten_thousand_requests_find_a_queue_that_is_bounded(box: Box) -> None:
    """They come at once, by the way that HTTP takes; gRPC's own would take them half a minute."""
    await box.load()
    request = StreamGenerateRequest(model=str(box.folder), text="hang")
    taken, refused = asyncio.Semaphore(0), Counter[str]()

    async def ask(number: int) -> None:
        call = LocalCall(f"ipv4:127.0.0.1:{number}")
        try:
            async for _ in box.local.stream(METHOD, request, call):
                taken.release()
        except LoaderdError as error:
            refused[error.reason] += 1

    asking = [asyncio.create_task(ask(number)) for number in range(MANY)]
    await until_in_loop(lambda: refused.total() == MANY - MAX_REQUESTS)
    assert refused == {"QUEUE_FULL": MANY - MAX_REQUESTS}
    for _ in range(MAX_REQUESTS):
        await taken.acquire()
    worker = box.launcher.workers[0]
    assert worker.running_requests == MAX_REQUESTS  # it has not even heard of the others
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    await until_in_loop(lambda: worker.running_requests == 0)
    assert [message async for message in box.stream("count 1")]


async def test_a_client_that_vanishes_frees_what_it_had_and_the_log_says_so(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loaderd.server.rpc.call")
    await box.load()
    caplog.clear()
    worker = box.launcher.workers[0]
    async with grpc.aio.insecure_channel(box.tcp) as channel:
        stub: Any = GenerationServiceStub(channel)
        request = StreamGenerateRequest(model=str(box.folder), text="hang")
        await anext(aiter(stub.StreamGenerate(request, timeout=60)))
        assert worker.running_requests == 1
    await until_in_loop(lambda: worker.running_requests == 0)
    await until_in_loop(lambda: bool(caplog.records))
    (line,) = [vars(each) for each in caplog.records]
    assert line["message"] == "/loaderd.v1.GenerationService/StreamGenerate CANCELLED"
