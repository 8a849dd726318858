"""Models with several replicas: requests, deaths, and numbers that change, on fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loaderd.server.errors import DeviceMemoryError, ModelUnsupportedError
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import OnDemand
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.restarts import MOST_DEATHS, Restarts
from loaderd.v1 import model_pb2, system_pb2
from tests.fake_worker import FakeWorker
from tests.unit.server import test_planner
from tests.unit.server.box import MAX_REQUESTS, Box, open_box, reason_of
from tests.unit.server.test_planner import box as gpus  # noqa: F401 - a fixture
from tests.waiting import until_in_loop as until

READY = model_pb2.MODEL_STATE_READY


@pytest.fixture
async def lasting(tmp_path: Path) -> AsyncIterator[Box]:
    """A box that brings models and replicas back, and loads nothing else by itself."""
    async with open_box(tmp_path, OnDemand.OFF, restart_wait_s=0.01) as opened:
        yield opened


def holding(box: Box | test_planner.Box) -> list[FakeWorker]:
    """The workers that hold a model or load one, oldest first."""
    return [worker for worker in box.launcher.workers if worker.loads and not worker.exited]


async def model_of(box: Box) -> model_pb2.Model:
    (model,) = await box.list()
    return model


async def until_serving(box: Box, count: int) -> model_pb2.Model:
    """Waits until the model is READY with so many replicas, and as many are wanted."""
    async with asyncio.timeout(20):
        while True:
            model = await model_of(box)
            serving = [replica for replica in model.replicas if not replica.leaving]
            if (model.state, len(serving), model.wanted_replicas) == (READY, count, count):
                return model
            await asyncio.sleep(0.01)


async def hang(box: Box) -> tuple[Any, FakeWorker]:
    """A request that runs until it is cancelled, and the worker that it is on."""
    before = {worker: worker.running_requests for worker in holding(box)}
    stream = box.stream("hang")
    await anext(aiter(stream))
    (worker,) = (each for each, count in before.items() if each.running_requests > count)
    return stream, worker


async def unload(box: Box, force: bool = False) -> model_pb2.UnloadModelResponse:
    request = model_pb2.UnloadModelRequest(model=str(box.folder), force=force)
    response: model_pb2.UnloadModelResponse = await box.models.UnloadModel(request, timeout=30)
    return response


async def test_requests_go_to_the_replica_with_the_fewest(box: Box) -> None:
    model = await box.load(replicas=2)
    assert model.wanted_replicas == 2
    assert [replica.worker_pid for replica in model.replicas] == [
        worker.pid for worker in holding(box)
    ]
    streams = [await hang(box) for _ in range(4)]
    assert [worker.running_requests for worker in holding(box)] == [2, 2]
    assert [replica.running_requests for replica in (await model_of(box)).replicas] == [2, 2]
    for stream, worker in streams:
        if worker is holding(box)[0]:
            stream.cancel()
    await until(lambda: holding(box)[0].running_requests == 0)
    assert {(await hang(box))[1] for _ in range(2)} == {holding(box)[0]}


async def test_the_steps_of_a_load_with_replicas_add_up_to_no_more_than_it_took(box: Box) -> None:
    box.launcher.load_gate.clear()
    while not (await box.system.GetServerInfo(system_pb2.GetServerInfoRequest())).standby_workers:
        await asyncio.sleep(0.01)
    box.launcher.standby_gate.clear()
    loading = asyncio.create_task(box.load(replicas=2))
    await until(lambda: box.launcher.loads == 1)  # the spare's; the other one's worker starts yet
    await asyncio.sleep(0.3)
    box.launcher.standby_gate.set()
    await until(lambda: box.launcher.loads == 2)
    box.launcher.load_gate.set()
    timings = (await loading).timings
    parts = (timings.placement, timings.worker, timings.weights, timings.engine)
    assert sum(part.ToMilliseconds() for part in parts) <= timings.total.ToMilliseconds()


async def test_each_replica_takes_as_many_requests_as_one_model_would(box: Box) -> None:
    await box.load(replicas=2)
    for _ in range(2 * MAX_REQUESTS):
        await hang(box)
    assert await reason_of(box.stream("count 1")) == "QUEUE_FULL"
    assert (await model_of(box)).active_requests == 2 * MAX_REQUESTS


async def test_a_death_ends_the_streams_of_one_replica_and_nothing_else(lasting: Box) -> None:
    box = lasting
    model = await box.load(replicas=2)
    (lost, victim), (kept, _) = [await hang(box) for _ in range(2)]
    with box.registry.events.subscribe() as events:
        victim.kill()
        assert await reason_of(lost) == "WORKER_DIED"
        await until_serving(box, 2)
        seen = aiter(events)
        for serving in (1, 2):
            event = await anext(seen)
            assert event.model.state is ModelState.READY
            assert len(event.model.replicas) == serving
            assert event.reason.value == ("worker_died" if serving == 1 else "replicas")
    back = await until_serving(box, 2)
    assert back.id == model.id
    assert not kept.done()
    numbers = [replica.number for replica in back.replicas]
    assert numbers == [2, 3] or numbers == [1, 3]
    texts = [message.delta.text async for message in box.stream("count 2")]
    assert "".join(texts) == "0 1 "
    assert box.launcher.loads == 3


async def test_a_model_without_replicas_fails_and_comes_back_with_all(lasting: Box) -> None:
    box = lasting
    model = await box.load(replicas=MOST_DEATHS + 2)
    box.launcher.load_gate.clear()
    with box.registry.events.subscribe() as events:
        for worker in holding(box):
            worker.kill()
            await asyncio.sleep(0.01)
        async for event in events:
            if event.model.state is ModelState.FAILED:
                break
        assert not event.model.replicas
    box.launcher.load_gate.set()
    assert (await until_serving(box, MOST_DEATHS + 2)).id == model.id


async def test_a_replica_that_dies_again_and_again_is_given_up_and_the_other_serves(
    lasting: Box,
) -> None:
    box = lasting
    await box.load(replicas=2)
    steady, _ = holding(box)
    for death in range(2 * MOST_DEATHS):
        await until_serving(box, 2)
        holding(box)[-1].kill()
        await until(lambda loads=3 + death: box.launcher.loads == loads)  # type: ignore[misc]
    await until_serving(box, 2)
    holding(box)[-1].kill()
    await until(lambda: len(holding(box)) == 1)
    await asyncio.sleep(0.3)
    model = await model_of(box)
    assert (model.state, len(model.replicas), model.wanted_replicas) == (READY, 1, 2)
    assert box.launcher.loads == 2 + 2 * MOST_DEATHS
    assert holding(box) == [steady]
    assert len((await box.load(replicas=2)).replicas) == 2, "somebody asks for it"


async def test_a_load_with_another_number_scales_and_one_without_does_not(box: Box) -> None:
    model = await box.load()
    assert (model.wanted_replicas, len(model.replicas)) == (1, 1)
    stream, _ = await hang(box)
    more = await box.load(replicas=3)
    assert (more.id, more.wanted_replicas, len(more.replicas)) == (model.id, 3, 3)
    assert (await box.load()).wanted_replicas == 3
    assert not stream.done()
    assert box.launcher.loads == 3


async def test_loads_at_once_share_the_new_replicas(box: Box) -> None:
    models = await asyncio.gather(*(box.load(replicas=2) for _ in range(3)))
    assert {len(model.replicas) for model in models} == {2}
    models = await asyncio.gather(*(box.load(replicas=3) for _ in range(3)))
    assert {len(model.replicas) for model in models} == {3}
    assert box.launcher.loads == 3


async def test_who_leaves_takes_no_more_requests_and_ends_after_its_last_one(
    lasting: Box,
) -> None:
    box = lasting
    await box.load(replicas=2)
    streams = [await hang(box) for _ in range(2)]
    model = await box.load(replicas=1)
    assert model.wanted_replicas == 1
    assert [replica.leaving for replica in model.replicas] == [False, True]
    staying, leaving = holding(box)
    assert {(await hang(box))[1] for _ in range(2)} == {staying}
    assert leaving.running_requests == 1
    next(stream for stream, worker in streams if worker is leaving).cancel()
    await until(lambda: leaving.exited)
    assert [replica.leaving for replica in (await until_serving(box, 1)).replicas] == [False]
    assert box.launcher.loads == 2


async def test_who_leaves_comes_back_when_more_are_wanted_again(box: Box) -> None:
    await box.load(replicas=2)
    streams = [await hang(box) for _ in range(2)]
    await box.load(replicas=1)
    model = await box.load(replicas=2)
    assert [replica.leaving for replica in model.replicas] == [False, False]
    for stream, _ in streams:
        stream.cancel()
    await until(lambda: not any(worker.running_requests for worker in holding(box)))
    assert len((await until_serving(box, 2)).replicas) == 2
    assert box.launcher.loads == 2


async def test_who_leaves_takes_the_place_of_one_that_dies(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    kept = dict([(await hang(box))[::-1] for _ in range(2)])
    await box.load(replicas=1)
    staying, leaving = holding(box)
    staying.kill()
    assert await reason_of(kept[staying]) == "WORKER_DIED"
    assert len((await until_serving(box, 1)).replicas) == 1
    assert not kept[leaving].done()
    assert (await hang(box))[1] is leaving
    assert box.launcher.loads == 2


async def test_who_dies_while_it_leaves_is_not_replaced(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    streams = dict([(await hang(box))[::-1] for _ in range(2)])
    await box.load(replicas=1)
    leaving = holding(box)[1]
    leaving.kill()
    assert await reason_of(streams[leaving]) == "WORKER_DIED"
    assert len((await until_serving(box, 1)).replicas) == 1
    await asyncio.sleep(0.1)
    assert box.launcher.loads == 2


async def test_more_replicas_come_all_or_none(box: Box) -> None:
    await box.load()
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(box.load(replicas=3))
    await until(lambda: box.launcher.loads == 3)
    first, *new = holding(box)
    new[0].kill()
    box.launcher.load_gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await growth
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len((await until_serving(box, 1)).replicas) == 1
    assert holding(box) == [first]
    box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    request = model_pb2.LoadModelRequest(model=str(box.folder), replicas=2)
    assert await reason_of(box.models.LoadModel(request, timeout=30)) == "MODEL_UNSUPPORTED"
    await until_serving(box, 1)


async def test_a_load_of_several_replicas_fails_as_one(box: Box) -> None:
    box.launcher.load_gate.clear()
    loading = asyncio.create_task(box.load(replicas=2))
    await until(lambda: box.launcher.loads == 2)
    assert (await model_of(box)).state == model_pb2.MODEL_STATE_LOADING
    holding(box)[1].kill()
    box.launcher.load_gate.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await loading
    assert (await model_of(box)).state == model_pb2.MODEL_STATE_FAILED
    assert holding(box) == []
    again = await box.load(replicas=2)
    assert (again.state, len(again.replicas)) == (READY, 2)


@pytest.mark.parametrize("was_loaded", [False, True])
async def test_a_load_that_is_cancelled_leaves_none_of_its_replicas(
    box: Box, was_loaded: bool
) -> None:
    if was_loaded:
        await box.load()
    before = holding(box)
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(box.load(replicas=3))
    await until(lambda: box.launcher.loads == 3)
    growth.cancel()
    await until(lambda: holding(box) == before)
    if was_loaded:
        await until_serving(box, 1)
    else:
        assert await box.list() == []


async def test_the_last_replica_dies_while_others_are_loaded(lasting: Box) -> None:
    box = lasting
    model = await box.load()
    box.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(box.folder), replicas=2)
    growth = asyncio.create_task(reason_of(box.models.LoadModel(request, timeout=30)))
    await until(lambda: box.launcher.loads == 2)
    holding(box)[0].kill()
    async with asyncio.timeout(5):  # less than a load may take
        assert await growth == "WORKER_DIED"
    await until(lambda: box.launcher.loads == 3)
    box.launcher.load_gate.set()
    assert (await until_serving(box, 1)).id == model.id
    assert len(holding(box)) == 1


async def test_one_of_several_dies_while_others_are_loaded(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(box.load(replicas=3))
    await until(lambda: box.launcher.loads == 3)
    holding(box)[0].kill()
    await until(lambda: len(holding(box)) == 2)
    box.launcher.load_gate.set()
    assert (await growth).wanted_replicas == 3
    await until_serving(box, 3)
    assert len(holding(box)) == 3


async def test_who_stays_after_all_dies_while_others_are_loaded(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    for _ in range(2):
        await hang(box)
    await box.load(replicas=1)
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(box.load(replicas=3))  # the one that was to leave stays
    await until(lambda: box.launcher.loads == 3)
    holding(box)[1].kill()
    await until(lambda: len(holding(box)) == 2)
    box.launcher.load_gate.set()
    await growth
    await until_serving(box, 3)


async def test_all_replicas_end_with_their_model(box: Box) -> None:
    await box.load(replicas=2)
    streams = [await hang(box) for _ in range(2)]
    await box.load(replicas=1)  # one is leaving, and ends as well
    workers = holding(box)
    answer = await unload(box, force=True)
    assert answer.freed_bytes == 2 << 20, "each fake holds a MiB"
    assert [await reason_of(stream) for stream, _ in streams] == 2 * ["MODEL_UNLOADED"]
    assert all(worker.exited for worker in workers)
    assert await box.list() == []


async def test_a_model_is_unloaded_while_a_replica_is_restarted(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    box.launcher.load_gate.clear()
    holding(box)[0].kill()
    await until(lambda: box.launcher.loads == 3)
    await unload(box)
    assert await box.list() == []
    assert holding(box) == []
    await asyncio.sleep(0.1)
    assert box.launcher.loads == 3


async def test_a_model_is_unloaded_while_it_gets_more_replicas(box: Box) -> None:
    await box.load()
    box.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(box.folder), replicas=2)
    growth = asyncio.create_task(reason_of(box.models.LoadModel(request, timeout=30)))
    await until(lambda: box.launcher.loads == 2)
    await unload(box)
    assert await growth == "MODEL_NOT_LOADED"
    assert await box.list() == []
    assert holding(box) == []


async def test_a_number_that_changes_while_another_one_is_made_true(box: Box) -> None:
    await box.load()
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(box.load(replicas=3))
    await until(lambda: box.launcher.loads == 3)
    shrinking = asyncio.create_task(box.load(replicas=1))
    await asyncio.sleep(0.05)
    assert not shrinking.done()
    box.launcher.load_gate.set()
    assert (await growth).id == (await shrinking).id
    await until(lambda: len(holding(box)) == 1)
    await until_serving(box, 1)


async def test_a_model_that_gets_more_replicas_is_in_use(tmp_path: Path) -> None:
    async with open_box(tmp_path, OnDemand.OFF, keep_alive_s=60) as box:
        assert (await box.load()).HasField("expires_at")
        box.launcher.load_gate.clear()
        growth = asyncio.create_task(box.load(replicas=2))
        await until(lambda: box.launcher.loads == 2)
        assert not (await model_of(box)).HasField("expires_at")
        box.launcher.load_gate.set()
        assert (await growth).HasField("expires_at")


async def test_a_daemon_that_drains_starts_no_more_replicas(lasting: Box) -> None:
    box = lasting
    await box.load(replicas=2)
    box.launcher.load_gate.clear()
    growth = asyncio.create_task(
        reason_of(
            box.models.LoadModel(
                model_pb2.LoadModelRequest(model=str(box.folder), replicas=3), timeout=30
            )
        )
    )
    await until(lambda: box.launcher.loads == 3)
    await box.registry.drain(0)
    assert await growth == "DRAINING"
    await until(lambda: len(holding(box)) == 2)
    holding(box)[0].kill()
    await until(lambda: len(holding(box)) == 1)
    await asyncio.sleep(0.1)
    assert box.launcher.loads == 3


async def test_each_replica_goes_to_an_accelerator_of_its_own(
    gpus: test_planner.Box,  # noqa: F811
) -> None:
    record = await gpus.load("a", replicas=2)
    maps = [worker.loads[0].options.device_map for worker in holding(gpus)]
    assert sorted(maps) == ["cuda:0", "cuda:1"]
    assert await gpus.held() == {"cuda:0": ["a"], "cuda:1": ["a"], "cpu": []}
    await gpus.registry.unload(record.id, force=False)
    assert await gpus.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}


async def test_replicas_that_do_not_fit_together_are_refused_before_any_is_loaded(
    gpus: test_planner.Box,  # noqa: F811
) -> None:
    gpus.registry.keep(await gpus.load("b"), float("inf"))
    with pytest.raises(DeviceMemoryError) as caught:
        await gpus.load("a", replicas=2)
    assert caught.value.needed_bytes is not None
    assert caught.value.free_bytes is not None
    assert caught.value.needed_bytes > caught.value.free_bytes
    assert gpus.launcher.loads == 1
    record = await gpus.load("a")
    with pytest.raises(DeviceMemoryError):
        await gpus.load("a", replicas=2)
    assert (record.state, record.replicas.wanted) == (ModelState.READY, 1)
    assert gpus.launcher.loads == 2
    plan = await gpus.planner.plan(str(gpus.folder / "c"), LoadOptions(), 2)
    assert not plan.placement.fits


async def test_a_replica_takes_the_place_of_another_model_but_not_of_its_own(
    gpus: test_planner.Box,  # noqa: F811
) -> None:
    record = await gpus.load("a")
    other = await gpus.load("b")
    assert await gpus.load("a", replicas=2) is record
    assert (record.state, other.state) == (ModelState.READY, ModelState.UNLOADED)
    with pytest.raises(DeviceMemoryError):
        await gpus.load("a", replicas=3)
    assert record.state is ModelState.READY
    assert await gpus.held() == {"cuda:0": ["a"], "cuda:1": ["a"], "cpu": []}
    await gpus.load("a", replicas=1)
    assert (await gpus.load("b")).state is ModelState.READY, "it waits for who is being ended"
    assert record.state is ModelState.READY


async def test_a_model_comes_back_with_as_many_replicas_as_fit(
    gpus: test_planner.Box,  # noqa: F811
) -> None:
    restarts = Restarts(gpus.loads, 0.01)
    record = await gpus.load("a", replicas=2)
    for worker in holding(gpus):
        worker.kill()
    await until(lambda: record.state is ModelState.FAILED)
    gpus.registry.keep(await gpus.load("b"), float("inf"))
    gpus.registry.on_death = restarts.begin
    restarts.begin(record)
    await until(lambda: record.state is ModelState.READY)
    assert (len(record.replicas.serving), record.replicas.wanted) == (1, 2)
    await gpus.registry.unload(str(gpus.folder / "b"), force=False)
    await until(lambda: len(record.replicas.serving) == 2)
    await restarts.close()
