"""Clients that ask much and clients that ask little, on one model."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from loaderd.client import Client
from loaderd.v1 import generation_pb2, generation_pb2_grpc
from tests.daemon import SpawnedDaemon

MANY = 12
SLOTS = 64
"""Of the engine. Two of the greedy client's requests take all of them."""


def connection(daemon: SpawnedDaemon) -> grpc.aio.Channel:
    """One of its own: channels of one process otherwise share one."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(daemon.address, options=options)


def ask(channel: grpc.aio.Channel, model: str, **parameters: Any) -> AsyncIterator[Any]:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.StreamGenerateRequest(
        model=model, text="The sky", ignore_eos=True, **parameters
    )
    stream: AsyncIterator[Any] = aiter(stub.StreamGenerate(request, timeout=120))
    return stream


async def test_many_requests_of_one_client_do_not_hold_up_the_one_of_another(
    daemon: SpawnedDaemon, client: Client, tiny_model: Path
) -> None:
    model = client.load(str(tiny_model)).id
    started: list[str] = []

    async def read(name: str, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            if message.HasField("started"):
                started.append(name)

    async with connection(daemon) as theirs, connection(daemon) as mine:
        greedy = [ask(theirs, model, n=SLOTS // 2, max_new_tokens=100) for _ in range(MANY)]
        # The first thing told to each is its start or its place in the queue: all have come.
        first = await asyncio.gather(*(anext(stream) for stream in greedy))
        assert [message.WhichOneof("event") for message in first].count("queued") >= MANY // 2
        started += ["greedy" for message in first if message.HasField("started")]
        readers = [asyncio.create_task(read("greedy", stream)) for stream in greedy]
        await read("modest", ask(mine, model, max_new_tokens=2))
        assert "modest" in started[: MANY // 2]
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
