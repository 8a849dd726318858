"""What each client may have: streams, requests, tokens, models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loaderd.server.access.caller import Caller, Limits
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role
from loaderd.server.access.tokens import digest
from loaderd.server.errors import ClientLimitError
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import outcome
from loaderd.server.models.record import LoadOptions, ModelRecord
from loaderd.server.rpc.access import Access
from loaderd.server.store.resolve import LocalFolder
from loaderd.server.store.store import ModelStore
from loaderd.v1 import generation_pb2, model_pb2
from tests.fake_worker import PROMPT_TOKENS
from tests.unit.server.box import Box, make_model, open_box
from tests.waiting import until_in_loop as until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """Calls a box as somebody."""

    def __init__(self, box: Box, name: str) -> None:
        self._box = box
        self._metadata = [("authorization", f"Bearer {token_of(name)}")]

    def stream(self, text: str) -> Any:
        request = generation_pb2.StreamGenerateRequest(model=str(self._box.folder), text=text)
        return self._box.generation.StreamGenerate(request, timeout=30, metadata=self._metadata)

    async def generate(self, text: str) -> None:
        async for _ in self.stream(text):
            pass

    async def tokenize(self) -> None:
        request = generation_pb2.TokenizeRequest(model=str(self._box.folder), text="x")
        await self._box.generation.Tokenize(request, timeout=30, metadata=self._metadata)

    def watch(self) -> Any:
        request = model_pb2.WatchModelsRequest()
        return self._box.models.WatchModels(request, timeout=30, metadata=self._metadata)

    async def load(self, folder: Path | None = None, dtype: int = 0) -> str:
        request = model_pb2.LoadModelRequest(model=str(folder or self._box.folder))
        request.options.dtype = dtype  # type: ignore[assignment]
        load = self._box.models.LoadModel(request, timeout=30, metadata=self._metadata)
        async for message in load:
            last = message
        return str(last.model.id)

    async def unload(self, model: str) -> None:
        request = model_pb2.UnloadModelRequest(model=model)
        await self._box.models.UnloadModel(request, timeout=30, metadata=self._metadata)


def token_of(name: str) -> str:
    return f"loaderd_the_token_of_{name}"


@asynccontextmanager
async def limited(
    tmp_path: Path, clock: Clock | None = None, **limits: int
) -> AsyncIterator[tuple[Box, Client, Client]]:
    """A box, a client with limits, and one without."""
    own = ", ".join(f"{name} = {value}" for name, value in limits.items())
    entries = [
        f'[[clients]]\nname = "{name}"\nrole = "admin"\n'
        f"token_sha256 = {json.dumps(digest(token_of(name)))}\nlimits = {{ {bounds} }}\n"
        for name, bounds in (("ann", own), ("bob", ""))
    ]
    file = tmp_path / "clients.toml"
    file.write_text("\n".join(entries))
    access = Access(ClientsFile(file), Quotas(clock or Clock()))
    async with open_box(tmp_path, access=access) as box:
        yield box, Client(box, "ann"), Client(box, "bob")


async def refused(call: Any, limit: str, most: int) -> float:
    """Checks that a call is refused because of a limit; the seconds that it is to wait."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    quota = error_details_pb2.QuotaFailure()
    for detail in status.details:
        for kind in (info, retry, quota):
            detail.Unpack(kind)
    assert info.reason == "CLIENT_LIMIT"
    assert (info.metadata["client"], info.metadata["limit"]) == ("ann", limit)
    assert info.metadata["most"] == str(most)
    assert quota.violations[0].subject == "client:ann"
    assert limit in quota.violations[0].description
    return float(retry.retry_delay.ToTimedelta().total_seconds())


async def test_streams(tmp_path: Path) -> None:
    async with limited(tmp_path, streams=2) as (_, ann, bob):
        open_ones = [ann.watch(), ann.watch()]
        for stream in open_ones:
            await anext(aiter(stream))
        assert await refused(ann.watch(), "streams", 2) >= 1
        others = [bob.watch() for _ in range(4)]
        for stream in others:
            await anext(aiter(stream))
        open_ones[0].cancel()

        async def there_is_room() -> bool:
            stream = ann.watch()
            try:
                await anext(aiter(stream))
            except grpc.aio.AioRpcError:
                return False
            stream.cancel()
            return True

        async with asyncio.timeout(10):
            while not await there_is_room():
                await asyncio.sleep(0.01)
        for stream in (*open_ones, *others):
            stream.cancel()


async def test_requests(tmp_path: Path) -> None:
    async with limited(tmp_path, requests=2) as (box, ann, bob):
        await bob.load()
        running = [ann.stream("hang"), ann.stream("hang")]
        for stream in running:
            await anext(aiter(stream))
        assert await refused(ann.stream("count 1"), "requests", 2) >= 1
        await refused(ann.tokenize(), "requests", 2)
        await bob.generate("count 1")
        running[0].cancel()
        await until(lambda: len(box.launcher.workers[0].cancelled) == 1)
        await ann.generate("count 1")
        await ann.tokenize()
        running[1].cancel()


async def test_a_request_that_is_refused_takes_no_place(tmp_path: Path) -> None:
    async with limited(tmp_path, requests=1) as (_, ann, bob):
        for call in (ann.generate("count 1"), ann.tokenize()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call  # nothing is loaded
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await bob.load()
        await ann.generate("count 1")
        await ann.tokenize()


async def test_tokens_of_prompts_and_outputs(tmp_path: Path) -> None:
    clock = Clock()
    async with limited(tmp_path, clock, tokens_per_minute=60) as (_, ann, bob):
        await bob.load()
        await ann.generate("count 30")
        await ann.generate("count 30")  # 60 - 2 * (5 + 30) are left
        assert await refused(ann.stream("count 1"), "tokens_per_minute", 60) == 11
        await bob.generate("count 30")
        clock.now += 10.5
        assert await refused(ann.tokenize(), "tokens_per_minute", 60) == 1
        clock.now += 0.5
        await ann.generate("count 1")
        clock.now += 3600  # no more is saved than for a minute
        await ann.generate(f"count {60 - PROMPT_TOKENS}")
        await refused(ann.stream("count 1"), "tokens_per_minute", 60)


async def test_tokens_count_while_a_request_runs(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=PROMPT_TOKENS) as (_, ann, bob):
        await bob.load()
        stream = ann.stream("hang")
        await anext(aiter(stream))
        await refused(ann.stream("count 1"), "tokens_per_minute", PROMPT_TOKENS)
        stream.cancel()


async def test_tokens_of_a_request_that_is_cancelled_count(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=PROMPT_TOKENS) as (box, ann, bob):
        await bob.load()
        stream = ann.stream("hang")
        await anext(aiter(stream))
        stream.cancel()
        await until(lambda: len(box.launcher.workers[0].cancelled) == 1)
        await refused(ann.stream("count 1"), "tokens_per_minute", PROMPT_TOKENS)


async def test_models(tmp_path: Path) -> None:
    async with limited(tmp_path, models=1) as (box, ann, bob):
        other = make_model(tmp_path / "other")
        third = make_model(tmp_path / "third")
        model = await ann.load()
        assert await ann.load() == model  # which is there
        assert await refused(ann.load(other), "models", 1) >= 1
        theirs = await bob.load(other)
        assert await ann.load(other) == theirs
        await refused(ann.load(third), "models", 1)
        await ann.unload(model)
        await ann.load(third)
        assert [each.name for each in await box_models(box)] == [str(other), str(third)]


async def box_models(box: Box) -> list[model_pb2.Model]:
    metadata = [("authorization", f"Bearer {token_of('bob')}")]
    answer = await box.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)
    return list(answer.models)


async def test_who_joins_a_load_that_is_refused_to_another_begins_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(tmp_path, models=1) as (box, ann, _):
        await ann.load()
        other = make_model(tmp_path / "other")
        # Both ask within one turn of the loop: the second one joins before the first is refused.
        found = LocalFolder(other, 1)
        monkeypatch.setattr(ModelStore, "resolve", lambda *_: asyncio.sleep(0, found))
        callers = [
            Caller("ann", Role.ADMIN, Limits(models=1)),
            Caller("bob", Role.ADMIN),
        ]
        loads = (box.loads.load(str(other), LoadOptions(), caller) for caller in callers)
        first, second = await asyncio.gather(*map(outcome, loads), return_exceptions=True)
        assert isinstance(first, ClientLimitError)
        assert isinstance(second, ModelRecord)
        assert second.state is ModelState.READY


async def test_the_clients_name_is_what_its_turns_in_the_queue_go_by(tmp_path: Path) -> None:
    async with limited(tmp_path) as (box, ann, bob):
        await bob.load()
        for client in (ann, bob, ann):
            await client.generate("count 1")
        assert box.launcher.workers[0].clients == ["ann", "bob", "ann"]


def test_limits_of_all_and_of_one(tmp_path: Path) -> None:
    file = tmp_path / "clients.toml"
    entry = '[[clients]]\nname = "{}"\nrole = "user"\ncertificate = "{}"\n'
    own = "limits = { streams = 9 }\n"
    file.write_text(
        "[limits]\nstreams = 2\nmodels = 1\n"
        + entry.format("a", "a")
        + entry.format("b", "b")
        + own
    )
    clients = ClientsFile(file)
    found = [clients.of_certificate([name]) for name in ("a", "b")]
    assert [client and (client.limits.streams, client.limits.models) for client in found] == [
        (2, 1),
        (9, 1),
    ]
