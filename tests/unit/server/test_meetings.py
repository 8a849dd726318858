"""Moments in which loads, unloads, requests, leases, deaths and evictions meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from loaderd.server.access.caller import Caller
from loaderd.server.errors import LoaderdError, ModelUnsupportedError
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import OnDemand
from loaderd.server.models.record import LoadOptions, ModelRecord
from loaderd.server.models.restarts import MOST_DEATHS
from loaderd.server.store.pins import Pin
from loaderd.server.supervisor.worker import Worker
from loaderd.v1 import generation_pb2, model_pb2
from loaderd.worker.v1 import worker_pb2
from tests.unit.server import test_loads, test_planner
from tests.unit.server.box import Box, open_box, reason_of
from tests.unit.server.test_loads import OLD
from tests.unit.server.test_loads import box as hub  # noqa: F401 - a fixture
from tests.unit.server.test_planner import MIB, ROOM, gpu
from tests.unit.server.test_planner import box as gpus  # noqa: F401 - a fixture
from tests.waiting import until_in_loop as until

READY = model_pb2.MODEL_STATE_READY


@pytest.fixture
async def demand(tmp_path: Path) -> AsyncIterator[Box]:
    """A box that loads what is asked for, if it is there."""
    async with open_box(tmp_path, OnDemand.CACHED) as opened:
        yield opened


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[Box]:
    """As `demand`, with the shortest keep-alive that is not 0."""
    async with open_box(tmp_path, OnDemand.CACHED, keep_alive_s=1e-5) as opened:
        yield opened


@pytest.fixture
async def lasting(tmp_path: Path) -> AsyncIterator[Box]:
    """A box that brings models back."""
    async with open_box(tmp_path, OnDemand.OFF, restart_wait_s=0.1) as opened:
        yield opened


@pytest.mark.parametrize("by", ["id", "name"])
async def test_a_request_does_not_load_again_what_is_being_unloaded(demand: Box, by: str) -> None:
    box = demand
    model = await box.load()
    running = box.stream("hang")
    await anext(aiter(running))
    unload = asyncio.create_task(box.registry.unload(model.id, force=True, grace_s=60))
    await until(lambda: box.registry.views()[0].state is ModelState.UNLOADING)
    late = asyncio.create_task(
        reason_of(box.stream("count 1", model=model.id if by == "id" else "", timeout=20))
    )
    done, _ = await asyncio.wait([late], timeout=1)
    running.cancel()
    await unload
    if by == "name":
        late.cancel()
        assert done, "it waits for the grace, though new requests are refused at once"
    assert await late == "MODEL_NOT_LOADED"
    assert box.launcher.loads == 1, "loaded again for a request that is refused"
    assert await box.list() == []


async def test_a_request_by_id_ends_when_another_model_has_the_same_files(
    hub: test_loads.Box,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub.loads, "on_demand", OnDemand.CACHED)
    hub.store.cached.add(OLD)
    failed = await hub.load("org/name")
    hub.launcher.workers[0].kill()
    await until(lambda: failed.state is ModelState.FAILED)
    hub.store.cached.clear()  # somebody deletes the snapshot, and a tag brings it back
    hub.store.gate.set()
    other = await hub.load("org/name@v1")
    assert (other.identity, other.state) == (failed.identity, ModelState.READY)
    asked, again = 0, hub.loads.again

    async def counted(record: ModelRecord, caller: Caller | None) -> ModelRecord:
        nonlocal asked
        asked += 1
        return await again(record, caller)

    monkeypatch.setattr(hub.loads, "again", counted)
    try:
        async with asyncio.timeout(1):
            await hub.loads.ensure(failed.id)
    except LoaderdError:
        pass
    finally:
        assert asked < 10


@pytest.mark.parametrize("is_back", [False, True])
async def test_a_model_loaded_without_keep_alive_waits_for_its_use(
    box: Box,
    is_back: bool,
) -> None:
    await box.load()
    generate = generation_pb2.GenerateRequest(model=str(box.folder), text="count 1")
    await box.generation.Generate(generate, timeout=30)
    if is_back:  # else it is READY still, and was used by somebody else
        box.launcher.workers[0].kill()
        await until(lambda: box.registry.views()[0].state is ModelState.FAILED)
    request = model_pb2.LoadModelRequest(model=str(box.folder), keep_alive=Duration())
    async for message in box.models.LoadModel(request, timeout=30):
        last = message
    assert last.model.state == READY
    await asyncio.sleep(0.1)
    await box.generation.Generate(generate, timeout=30)


async def test_a_model_that_a_load_gives_out_stays_for_its_keep_alive(box: Box) -> None:
    request = model_pb2.LoadModelRequest(model=str(box.folder), keep_alive=Duration(seconds=60))
    async for _ in box.models.LoadModel(request, timeout=30):
        pass
    await asyncio.sleep(1.2)
    request.keep_alive.CopyFrom(Duration(seconds=1))
    async for message in box.models.LoadModel(request, timeout=30):
        last = message
    assert last.model.state == READY
    await asyncio.sleep(0.2)
    assert [model.state for model in await box.list()] == [READY]


@pytest.mark.parametrize("what", ["answer", "pin"])
async def test_a_failed_model_that_is_unloaded_while_it_is_loaded_again(
    hub: test_loads.Box,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    hub.store.cached.add(OLD)
    record = await hub.load("org/name")
    hub.launcher.workers[0].kill()
    await until(lambda: record.state is ModelState.FAILED)
    gate, waits, hold = asyncio.Event(), asyncio.Event(), hub.store.hold

    async def slow_hold(files: Any, holder: str) -> Pin:
        waits.set()
        await gate.wait()
        return await hold(files, holder)

    monkeypatch.setattr(hub.store, "hold", slow_hold)
    load = asyncio.create_task(hub.load("org/name"))
    await waits.wait()
    await hub.registry.unload(record.id, force=True)
    gate.set()
    (outcome,) = await asyncio.gather(load, return_exceptions=True)
    if what == "answer":
        assert not (isinstance(outcome, LoaderdError) and outcome.reason == "INTERNAL"), outcome
    held = hub.store.pins.all()
    alive = {view.id for view in hub.registry.views()}
    assert all(holder in alive for holders in held.values() for holder in holders), held


async def test_a_model_that_is_being_unloaded_is_waited_for_rather_than_refused(
    gpus: test_planner.Box,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = await gpus.load("a")
    second = await gpus.load("b")
    gate, close = asyncio.Event(), Worker.close

    async def slow_close(worker: Worker, error: LoaderdError | None = None) -> None:
        await gate.wait()
        await close(worker, error)

    monkeypatch.setattr(Worker, "close", slow_close)
    gpus.registry.keep(second, float("inf"))
    unload = asyncio.create_task(gpus.registry.unload(first.id, force=False))
    await until(lambda: first.state is ModelState.UNLOADING)
    load = asyncio.create_task(gpus.load("c"))
    await asyncio.wait([load], timeout=0.5)
    gate.set()
    await unload
    assert (await load).state is ModelState.READY


async def test_memory_that_a_spare_saw_taken_is_not_counted_twice(
    gpus: test_planner.Box,  # noqa: F811
) -> None:
    launcher = gpus.launcher
    launcher.load_gate.clear()
    loads = [asyncio.create_task(gpus.load(name)) for name in ("a", "b")]
    await until(lambda: launcher.loads == 2)
    launcher.standby_gate.clear()
    one, two = [worker for worker in launcher.workers if worker.loads]

    def loaded(worker: Any) -> None:
        device = worker.loads[0].options.device_map
        worker._send(loaded=worker_pb2.Loaded(held_bytes={device: 100 * MIB}))

    workers = len(launcher.workers)
    loaded(one)
    await until(lambda: len(launcher.workers) == workers + 1)  # the spare begins to import
    await asyncio.sleep(0.05)
    loaded(two)
    await asyncio.gather(*loads)
    for index in range(2):
        device = gpu(index)
        device.free_bytes = ROOM - 100 * MIB
        launcher.devices[index] = device  # what it sees when it has imported
    before = gpus.planner._inventory.measured_at
    launcher.standby_gate.set()
    await until(lambda: gpus.planner._inventory.measured_at != before)
    for device in (await gpus.planner.devices())[:2]:
        more = device.reserved_bytes - 100 * MIB
        assert device.available_bytes == ROOM - 100 * MIB - more, device.id


async def test_a_request_with_a_lease_that_has_ended_loads_nothing(demand: Box) -> None:
    box = demand
    request = generation_pb2.GenerateRequest(
        model=str(box.folder), text="count 1", lease_id="ended"
    )
    assert await reason_of(box.generation.Generate(request, timeout=30)) == "LEASE_NOT_FOUND"
    assert box.launcher.loads == 0


async def test_a_slow_reader_of_a_load_takes_no_name_from_the_model_that_has_it(
    hub: test_loads.Box,  # noqa: F811
) -> None:
    hub.store.cached.add(OLD)
    hub.launcher.load_gate.clear()
    async with aclosing(hub.loads.load("org/name", LoadOptions())) as slow:
        await anext(slow)
        hub.launcher.load_gate.set()
        first = await hub.load("org/name")
        await hub.registry.unload(first.id, force=False)
        second = await hub.load("org/name")
        async for _ in slow:
            pass
    assert hub.registry.find("org/name") is second


async def test_requests_are_served_however_short_the_keep_alive_is(hasty: Box) -> None:
    box = hasty
    request = generation_pb2.GenerateRequest(model=str(box.folder), text="count 1")
    try:
        await box.generation.Generate(request, timeout=3)
    finally:
        assert box.launcher.loads == 1


async def test_a_second_unload_by_force_ends_a_grace(box: Box) -> None:
    model = await box.load()
    stream = box.stream("hang")
    await anext(aiter(stream))
    first = asyncio.create_task(box.registry.unload(model.id, force=True, grace_s=3600))
    await until(lambda: box.registry.views()[0].state is ModelState.UNLOADING)
    request = model_pb2.UnloadModelRequest(model=model.id, force=True)
    try:
        await box.models.UnloadModel(request, timeout=10)
    finally:
        stream.cancel()
        await first


async def test_a_lease_is_acquired_in_the_moment_when_the_model_is_ready(hasty: Box) -> None:
    request = model_pb2.LoadModelRequest(model=str(hasty.folder), lease_ttl=Duration(seconds=60))
    async for message in hasty.models.LoadModel(request, timeout=30):
        last = message
    assert last.lease.id
    assert (await hasty.list())[0].active_leases == 1


async def test_a_failed_model_and_its_lease_outlive_a_load_that_is_cancelled(box: Box) -> None:
    model = await box.load()
    acquire = model_pb2.AcquireLeaseRequest(model=model.id, ttl=Duration(seconds=60))
    lease = (await box.models.AcquireLease(acquire, timeout=30)).lease
    box.launcher.workers[0].kill()
    await until(lambda: box.registry.views()[0].state is ModelState.FAILED)
    box.launcher.load_gate.clear()
    load = asyncio.create_task(box.load())
    await until(lambda: box.launcher.loads == 2)
    load.cancel()
    await until(lambda: not any(view.state.is_loading for view in box.registry.views()))
    await box.models.RenewLease(model_pb2.RenewLeaseRequest(lease_id=lease.id), timeout=30)


async def test_leases_are_bounded(box: Box) -> None:
    model = await box.load()
    with pytest.raises(LoaderdError):
        for _ in range(100_000):
            box.registry.leases.acquire(model.id, 24 * 3600)


async def test_a_model_is_not_evicted_before_those_who_loaded_it_have_it(
    gpus: test_planner.Box,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus.registry.keep(await gpus.load("b"), float("inf"))
    gpus.launcher.load_gate.clear()
    load = asyncio.create_task(gpus.load("a"))
    await until(lambda: gpus.launcher.loads == 2)
    measure, change = gpus.planner._measure, gpus.registry.to
    measured, is_ready = asyncio.Event(), asyncio.Event()

    async def slow_measure() -> Any:
        devices = await measure()
        measured.set()
        await is_ready.wait()
        return devices

    def to(record: ModelRecord, state: ModelState, failure: LoaderdError | None = None) -> None:
        change(record, state, failure)
        if state is ModelState.READY:
            is_ready.set()

    monkeypatch.setattr(gpus.planner, "_measure", slow_measure)
    monkeypatch.setattr(gpus.registry, "to", to)
    other = asyncio.create_task(gpus.load("c"))
    await measured.wait()
    gpus.launcher.load_gate.set()
    state = (await load).state
    await asyncio.gather(other, return_exceptions=True)
    assert state is ModelState.READY


async def test_the_keep_alive_begins_when_no_lease_holds_the_model_any_more(box: Box) -> None:
    request = model_pb2.LoadModelRequest(
        model=str(box.folder), keep_alive=Duration(seconds=1), lease_ttl=Duration(seconds=60)
    )
    async for message in box.models.LoadModel(request, timeout=30):
        last = message
    await asyncio.sleep(1.2)
    release = model_pb2.ReleaseLeaseRequest(lease_id=last.lease.id)
    await box.models.ReleaseLease(release, timeout=30)
    await asyncio.sleep(0.2)
    assert [model.state for model in await box.list()] == [READY]


async def test_a_name_means_the_model_that_comes_rather_than_the_one_that_goes(
    demand: Box,
) -> None:
    model = await demand.load()
    running = demand.stream("hang")
    await anext(aiter(running))
    unload = asyncio.create_task(demand.registry.unload(model.id, force=True, grace_s=60))
    await until(lambda: demand.registry.views()[0].state is ModelState.UNLOADING)
    demand.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(demand.folder))
    request.options.dtype = model_pb2.DTYPE_FLOAT32
    load = demand.models.LoadModel(request, timeout=30)
    await anext(aiter(load))
    try:
        get = model_pb2.GetModelRequest(model=str(demand.folder))
        await demand.models.GetModel(get, timeout=10)
    finally:
        demand.launcher.load_gate.set()
        running.cancel()
        await unload


async def test_a_model_is_brought_back_by_one_task(lasting: Box) -> None:
    box = lasting
    await box.load()
    box.launcher.workers[0].kill()
    await until(lambda: box.launcher.loads == 2)
    await until(lambda: box.registry.views()[0].state is ModelState.READY)
    next(worker for worker in box.launcher.workers if worker.loads and not worker.exited).kill()
    await until(lambda: box.registry.views()[0].state is ModelState.FAILED)
    await box.load()  # somebody is faster than the second restart, which waits
    assert box.launcher.loads == 3
    box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    next(worker for worker in box.launcher.workers if worker.loads and not worker.exited).kill()
    await asyncio.sleep(3)
    assert box.launcher.loads <= MOST_DEATHS + 1
