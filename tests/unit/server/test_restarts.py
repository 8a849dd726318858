"""Models whose workers die, on fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.models.loads import OnDemand
from loaderd.server.models.restarts import MOST_DEATHS
from loaderd.v1 import model_pb2
from tests.unit.server.box import Box, open_box, reason_of
from tests.waiting import until_in_loop as until

READY, FAILED = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_FAILED


@pytest.fixture
async def lasting(tmp_path: Path) -> AsyncIterator[Box]:
    """A box that brings models back, and loads nothing else by itself."""
    async with open_box(tmp_path, OnDemand.OFF, restart_wait_s=0.01) as box:
        yield box


async def until_state(box: Box, state: model_pb2.ModelState.ValueType) -> model_pb2.Model:
    async with asyncio.timeout(20):
        while True:
            models = await box.list()
            if models and models[0].state == state:
                return models[0]
            await asyncio.sleep(0.01)


async def kill(box: Box, loads: int) -> None:
    """Ends the worker of the load with this number, and waits for the next load."""
    box.launcher.workers[loads - 1].kill()
    await until(lambda: box.launcher.loads == loads + 1)


async def test_a_model_whose_worker_died_comes_back_with_its_id(lasting: Box) -> None:
    model = await lasting.load()
    assert await reason_of(lasting.stream("die")) == "WORKER_DIED"
    await until(lambda: lasting.launcher.loads == 2)
    back = await until_state(lasting, READY)
    assert back.id == model.id
    texts = [message.delta.text async for message in lasting.stream("count 2", model=model.id)]
    assert "".join(texts) == "0 1 "


async def test_a_lease_survives_the_worker(lasting: Box) -> None:
    model = await lasting.load()
    request = model_pb2.AcquireLeaseRequest(model=model.id)
    request.ttl.FromSeconds(60)
    lease = (await lasting.models.AcquireLease(request, timeout=30)).lease
    await kill(lasting, 1)
    assert (await until_state(lasting, READY)).active_leases == 1
    await lasting.models.RenewLease(model_pb2.RenewLeaseRequest(lease_id=lease.id), timeout=30)


async def test_a_model_that_dies_again_and_again_is_given_up(lasting: Box) -> None:
    await lasting.load()
    for death in range(1, MOST_DEATHS + 1):
        await kill(lasting, death)
        await until_state(lasting, READY)
    lasting.launcher.workers[MOST_DEATHS].kill()
    failed = await until_state(lasting, FAILED)
    assert failed.failure.reason
    await asyncio.sleep(0.3)
    assert lasting.launcher.loads == MOST_DEATHS + 1
    assert (await lasting.load()).id == failed.id, "somebody asks for it"


async def test_a_load_that_fails_is_tried_again_and_then_given_up(lasting: Box) -> None:
    await lasting.load()
    lasting.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    lasting.launcher.workers[0].kill()
    await until(lambda: lasting.launcher.loads == MOST_DEATHS + 1)
    failed = await until_state(lasting, FAILED)
    assert "y" in failed.failure.message


async def test_who_unloads_a_failed_model_has_the_last_word(tmp_path: Path) -> None:
    async with open_box(tmp_path, OnDemand.OFF, restart_wait_s=0.3) as box:
        await box.load()
        box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
        await kill(box, 1)
        await until_state(box, FAILED)
        unload = model_pb2.UnloadModelRequest(model=str(box.folder))
        await box.models.UnloadModel(unload, timeout=30)
        await asyncio.sleep(0.6)
        assert await box.list() == []
        assert box.launcher.loads == 2


async def test_a_worker_that_is_ended_on_purpose_stays_so(lasting: Box) -> None:
    await lasting.load()
    unload = model_pb2.UnloadModelRequest(model=str(lasting.folder))
    await lasting.models.UnloadModel(unload, timeout=30)
    await asyncio.sleep(0.1)
    assert lasting.launcher.loads == 1


async def test_a_request_waits_for_the_restart(tmp_path: Path) -> None:
    async with open_box(tmp_path, OnDemand.CACHED, restart_wait_s=0.01) as box:
        model = await box.load()
        box.launcher.load_gate.clear()
        await kill(box, 1)
        waiting = asyncio.create_task(anext(aiter(box.stream("count 1", model=model.id))))
        await asyncio.sleep(0.05)
        box.launcher.load_gate.set()
        assert (await waiting).started.model_id == model.id
