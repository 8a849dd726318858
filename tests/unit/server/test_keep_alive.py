"""Models that come when they are asked for and go when nobody uses them, on fake workers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from loaderd.server.errors import DeviceMemoryError, ModelUnsupportedError
from loaderd.server.models import record
from loaderd.server.models.loads import OnDemand
from loaderd.v1 import generation_pb2, model_pb2
from tests.unit.server.box import Box, make_model, open_box, reason_of
from tests.waiting import until_in_loop as until

SOON_S = 0.1
READY = model_pb2.MODEL_STATE_READY


@pytest.fixture
async def demand(tmp_path: Path) -> AsyncIterator[Box]:
    """A box that loads what is asked for, if it is there."""
    async with open_box(tmp_path, OnDemand.CACHED) as box:
        yield box


def seconds(number: float) -> Duration:
    return Duration(nanos=round(number * 1e9) % 10**9, seconds=int(number))


async def load(box: Box, **fields: Any) -> model_pb2.LoadModelResponse:
    request = model_pb2.LoadModelRequest(model=str(box.folder), **fields)
    async for message in box.models.LoadModel(request, timeout=30):
        last = message
    answer: model_pb2.LoadModelResponse = last
    return answer


async def generate(box: Box, text: str = "count 2", **fields: Any) -> str:
    request = generation_pb2.GenerateRequest(
        model=fields.pop("model", str(box.folder)), text=text, **fields
    )
    answer = await box.generation.Generate(request, timeout=30)
    return "".join(completion.text for completion in answer.completions)


@contextlib.asynccontextmanager
async def changes(box: Box) -> AsyncIterator[list[model_pb2.ModelEvent]]:
    """Collects the changes of models while it is open."""
    events: list[model_pb2.ModelEvent] = []
    watch = box.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=60)
    await anext(aiter(watch))

    async def collect() -> None:
        async for update in watch:
            events.append(update.event)

    task = asyncio.create_task(collect())
    yield events
    task.cancel()
    watch.cancel()


async def is_gone(box: Box) -> bool:
    return not await box.list()


async def until_gone(box: Box) -> None:
    async with asyncio.timeout(20):
        while not await is_gone(box):
            await asyncio.sleep(0.01)


async def test_a_model_that_nobody_uses_goes(box: Box) -> None:
    async with changes(box) as events:
        answer = await load(box, keep_alive=seconds(SOON_S))
        assert answer.model.expires_at.seconds
        await until_gone(box)
        await until(lambda: events[-1].model.state == model_pb2.MODEL_STATE_UNLOADED)
    leaving = [event.reason for event in events[-2:]]
    assert leaving == [model_pb2.CHANGE_REASON_IDLE] * 2
    assert box.launcher.workers[0].exited


async def test_a_model_goes_after_its_last_use_and_not_in_it(box: Box) -> None:
    await load(box)
    stream = box.generation.StreamGenerate(
        generation_pb2.StreamGenerateRequest(
            model=str(box.folder), text="hang", keep_alive=seconds(SOON_S)
        ),
        timeout=30,
    )
    await anext(aiter(stream))
    await asyncio.sleep(3 * SOON_S)
    (model,) = await box.list()
    assert (model.state, model.active_requests) == (READY, 1)
    assert not model.HasField("expires_at")
    stream.cancel()
    await until_gone(box)


async def test_without_keep_alive_a_model_waits_for_its_first_use(box: Box) -> None:
    await load(box, keep_alive=Duration())
    await asyncio.sleep(3 * SOON_S)
    assert await generate(box) == "0 1 "
    await until_gone(box)


async def test_a_lease_outlives_the_keep_alive(box: Box) -> None:
    answer = await load(box, keep_alive=seconds(SOON_S), lease_ttl=seconds(60))
    assert answer.lease.model_id == answer.model.id
    assert answer.model.active_leases == 1
    await asyncio.sleep(3 * SOON_S)
    assert await generate(box, lease_id=answer.lease.id) == "0 1 "
    release = model_pb2.ReleaseLeaseRequest(lease_id=answer.lease.id)
    await box.models.ReleaseLease(release, timeout=30)
    await until_gone(box)


async def test_a_lease_ends_by_itself(box: Box) -> None:
    await load(box, keep_alive=seconds(SOON_S), lease_ttl=seconds(1))
    await until_gone(box)


async def test_a_lease_on_another_model_does_not_help(box: Box, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    await box.load(other)
    lease = (await load(box, lease_ttl=seconds(60))).lease
    request = generation_pb2.GenerateRequest(model=str(other), text="count 1", lease_id=lease.id)
    assert await reason_of(box.generation.Generate(request, timeout=30)) == "LEASE_NOT_FOUND"
    assert all(model.active_requests == 0 for model in await box.list())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lease_ttl", Duration(seconds=100_000)),
        ("lease_ttl", Duration(nanos=5)),
        ("keep_alive", Duration(seconds=400_000_000_000)),
    ],
)
async def test_a_load_that_asks_for_too_much_is_refused_before_it_begins(
    box: Box, field: str, value: Duration
) -> None:
    request = model_pb2.LoadModelRequest(model=str(box.folder), **{field: value})  # type: ignore[arg-type]
    assert await reason_of(box.models.LoadModel(request, timeout=30)) == "INVALID_ARGUMENT"
    assert box.launcher.loads == 0


async def test_force_lets_requests_finish_in_their_grace(box: Box) -> None:
    await load(box)
    stream = box.generation.StreamGenerate(
        generation_pb2.StreamGenerateRequest(model=str(box.folder), text="hang"), timeout=30
    )
    await anext(aiter(stream))
    unload = model_pb2.UnloadModelRequest(model=str(box.folder), force=True, grace=seconds(60))
    ending = asyncio.ensure_future(box.models.UnloadModel(unload, timeout=30))
    async with asyncio.timeout(20):
        while (await box.list())[0].state != model_pb2.MODEL_STATE_UNLOADING:
            await asyncio.sleep(0.01)
    request = generation_pb2.GenerateRequest(model=str(box.folder), text="count 1")
    assert await reason_of(box.generation.Generate(request, timeout=30)) == "MODEL_NOT_LOADED"
    assert not box.launcher.workers[0].exited
    stream.cancel()
    assert (await ending).model.state == model_pb2.MODEL_STATE_UNLOADED


async def test_a_grace_has_an_end(box: Box) -> None:
    await load(box)
    stream = box.stream("hang")
    await anext(aiter(stream))
    unload = model_pb2.UnloadModelRequest(model=str(box.folder), force=True, grace=seconds(SOON_S))
    await box.models.UnloadModel(unload, timeout=30)
    assert await reason_of(stream) == "MODEL_UNLOADED"


async def test_a_shutdown_does_not_wait_for_a_grace(tmp_path: Path) -> None:
    async with asyncio.timeout(30), open_box(tmp_path) as box:
        await load(box)
        stream = box.stream("hang")
        await anext(aiter(stream))
        unload = model_pb2.UnloadModelRequest(
            model=str(box.folder), force=True, grace=seconds(3600)
        )
        ending = asyncio.ensure_future(box.models.UnloadModel(unload, timeout=30))
        async with asyncio.timeout(20):
            while (await box.list())[0].state != model_pb2.MODEL_STATE_UNLOADING:
                await asyncio.sleep(0.01)
    ending.cancel()
    assert box.launcher.workers[0].exited


async def test_a_request_loads_the_model_that_it_names(demand: Box) -> None:
    assert await generate(demand) == "0 1 "
    texts = [message.delta.text async for message in demand.stream("count 3")]
    assert "".join(texts) == "0 1 2 "
    request = generation_pb2.TokenizeRequest(model=str(demand.folder), text="x")
    await demand.generation.Tokenize(request, timeout=30)
    assert demand.launcher.loads == 1


async def test_requests_share_the_load_that_they_wait_for(demand: Box) -> None:
    demand.launcher.load_gate.clear()
    waiting = [asyncio.create_task(generate(demand)) for _ in range(3)]
    explicit = asyncio.create_task(demand.load())
    await until(lambda: demand.launcher.loads == 1)
    waiting[0].cancel()
    demand.launcher.load_gate.set()
    assert await asyncio.gather(*waiting[1:]) == ["0 1 ", "0 1 "]
    assert (await explicit).state == READY
    assert demand.launcher.loads == 1


async def test_a_model_that_failed_is_loaded_again_with_its_options(demand: Box) -> None:
    request = model_pb2.LoadModelRequest(model=str(demand.folder))
    request.options.dtype = model_pb2.DTYPE_FLOAT32
    async for _ in demand.models.LoadModel(request, timeout=30):
        pass
    assert await reason_of(demand.stream("die")) == "WORKER_DIED"
    assert await generate(demand) == "0 1 "
    (model,) = await demand.list()
    assert model.options.dtype == model_pb2.DTYPE_FLOAT32


async def test_who_waits_for_a_load_on_demand_gets_its_failure(demand: Box) -> None:
    demand.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    assert await reason_of(demand.stream("count 1")) == "MODEL_UNSUPPORTED"


async def test_a_load_that_has_just_failed_is_not_tried_by_every_request(demand: Box) -> None:
    demand.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    for _ in range(3):
        assert await reason_of(demand.stream("count 1")) == "MODEL_UNSUPPORTED"
    assert demand.launcher.loads == 1
    demand.launcher.load_error = None
    await demand.load()  # whoever asks for a load gets one
    assert await generate(demand) == "0 1 "


async def test_a_load_that_has_failed_is_tried_again_when_it_has_rested(
    demand: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_SHORTEST_REST_S", 0.0)
    monkeypatch.setattr(record, "_LONGEST_REST_S", 0.0)
    demand.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    assert await reason_of(demand.stream("count 1")) == "MODEL_UNSUPPORTED"
    demand.launcher.load_error = None
    assert await generate(demand) == "0 1 "


async def test_what_lacked_memory_is_tried_by_the_next_request(demand: Box) -> None:
    demand.launcher.load_error = DeviceMemoryError(model="x")
    assert await reason_of(demand.stream("count 1")) == "DEVICE_MEMORY"
    demand.launcher.load_error = None
    assert await generate(demand) == "0 1 "


async def test_a_model_that_dies_in_its_last_request_has_failed(box: Box) -> None:
    request = model_pb2.LoadModelRequest(model=str(box.folder), keep_alive=Duration())
    async for _ in box.models.LoadModel(request, timeout=30):
        pass
    async with changes(box) as events:
        assert await reason_of(box.stream("die")) == "WORKER_DIED"
        async with asyncio.timeout(20):
            while not events:
                await asyncio.sleep(0.01)
    assert [event.model.state for event in events] == [model_pb2.MODEL_STATE_FAILED]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/unknown", "MODEL_NOT_LOADED"),  # it would have to be downloaded
        ("m:0123456789ab", "MODEL_NOT_LOADED"),
        ("not a name", "INVALID_NAME"),
    ],
)
async def test_what_is_not_there_is_not_loaded_on_demand(
    demand: Box, name: str, reason: str
) -> None:
    assert await reason_of(demand.stream("count 1", model=name)) == reason
    assert await is_gone(demand)


async def test_any_model_means_downloads_too(tmp_path: Path) -> None:
    async with open_box(tmp_path, OnDemand.ANY) as box:
        # This box has no hub: that it was asked for shows in the answer.
        assert await reason_of(box.stream("count 1", model="org/unknown")) == "OFFLINE_NOT_CACHED"


async def test_nothing_is_loaded_on_demand_where_that_is_off(box: Box) -> None:
    assert await reason_of(box.stream("count 1")) == "MODEL_NOT_LOADED"
    assert box.launcher.loads == 0


async def test_models_that_go_come_back(tmp_path: Path) -> None:
    """Requests while the model goes after each: none is refused, none is lost."""
    async with open_box(tmp_path, OnDemand.CACHED, keep_alive_s=0.0) as box:
        for _ in range(5):
            assert await asyncio.gather(*(generate(box) for _ in range(3))) == ["0 1 "] * 3
        assert box.launcher.loads > 1
        await until_gone(box)
    shutil.rmtree(tmp_path / "model")
