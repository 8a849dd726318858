"""What engines report, as clients see it; and who calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from loaderd.server.rpc.clients import MEMORY_S, Clients
from loaderd.server.supervisor.engine_meter import WINDOW_S, EngineMeter
from loaderd.v1 import model_pb2, system_pb2, system_pb2_grpc
from loaderd.worker.v1.worker_pb2 import EngineReport
from tests.unit.server.box import Box, open_box
from tests.waiting import until_in_loop as until

ROUNDING = timedelta(microseconds=10)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with open_box(tmp_path) as box:
        yield box


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_of_an_engine_at_work_is_that_between_its_reports() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    clock.now += 1000  # idle for long: that is not counted
    meter.note(EngineReport(running_requests=1))
    for second in range(1, 4):
        clock.now += 1
        meter.note(EngineReport(running_requests=1, generated_tokens=20 * second))

    read = meter.read()

    assert (read.running_requests, read.generated_tokens) == (1, 60)
    assert read.generated_tokens_per_second == pytest.approx(20)
    clock.now += 0.9  # what came since is not known yet
    assert meter.read().generated_tokens_per_second == pytest.approx(20)


def test_the_rate_of_an_engine_at_rest_falls_to_nothing() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    meter.note(EngineReport(running_requests=1))
    clock.now += 2
    meter.note(EngineReport(prompt_tokens=100, generated_tokens=40))

    assert meter.read().prompt_tokens_per_second == pytest.approx(50)
    clock.now += 2
    assert meter.read().prompt_tokens_per_second == pytest.approx(25)
    clock.now += WINDOW_S
    read = meter.read()
    assert (read.prompt_tokens_per_second, read.generated_tokens_per_second) == (0, 0)
    assert (read.prompt_tokens, read.generated_tokens) == (100, 40)


def test_a_step_that_is_longer_than_the_window_has_a_rate() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    meter.note(EngineReport(running_requests=1))
    clock.now += 4 * WINDOW_S
    meter.note(EngineReport(running_requests=1, prompt_tokens=2000))

    clock.now += 2 * WINDOW_S
    assert meter.read().prompt_tokens_per_second == pytest.approx(2000 / (4 * WINDOW_S))


async def test_a_ready_model_tells_what_its_engine_does(box: Box) -> None:
    loaded = await box.load()
    assert loaded.statistics == model_pb2.ModelStatistics()

    box.launcher.workers[0].report(
        EngineReport(queued_requests=2, prompt_tokens=30, kv_tokens=5, kv_capacity_tokens=50)
    )

    def statistics() -> model_pb2.ModelStatistics:
        (view,) = box.registry.views()
        assert view.statistics is not None
        return view.statistics

    await until(lambda: statistics().queued_requests == 2)
    found = (await box.list())[0].statistics
    assert (found.prompt_tokens, found.kv_tokens, found.kv_capacity_tokens) == (30, 5, 50)
    gone = await box.models.UnloadModel(model_pb2.UnloadModelRequest(model=loaded.id))
    assert not gone.model.HasField("statistics")


async def test_a_load_says_where_its_time_went(box: Box) -> None:
    timings = (await box.load()).timings

    told = {field.name: value.ToTimedelta() for field, value in timings.ListFields()}
    # A local folder is not downloaded, and has no hashes to compare with.
    assert set(told) == {"resolve", "placement", "worker", "weights", "engine", "total"}
    total = told.pop("total")
    assert sum(told.values(), timedelta()) <= total + ROUNDING


async def test_a_change_tells_how_long_the_state_before_was(box: Box) -> None:
    watch = box.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=30)
    await watch.read()
    await box.load()

    events = [(await watch.read()).event for _ in range(3)]

    assert [event.HasField("previous_duration") for event in events] == [False, True, True]
    total = events[1].previous_duration.ToTimedelta() + events[2].previous_duration.ToTimedelta()
    assert abs(total - events[2].model.timings.total.ToTimedelta()) < ROUNDING
    watch.cancel()


async def test_devices_tell_what_loads_have_taken(box: Box) -> None:
    box.launcher.held_bytes = {"cpu": 5 << 20}
    await box.load()

    (cpu,) = (await box.system.ListDevices(system_pb2.ListDevicesRequest())).devices

    assert cpu.taken_bytes == 5 << 20
    assert cpu.reserved_bytes >= cpu.taken_bytes


async def test_the_daemon_tells_who_calls_and_what_runs(box: Box) -> None:
    await box.load()
    stream = box.stream("hang")
    await stream.read()
    async with grpc.aio.insecure_channel(box.tcp, options=[("x", 1)]) as other:
        info = await system_pb2_grpc.SystemServiceStub(other).GetServerInfo(
            system_pb2.GetServerInfoRequest()
        )

    assert (info.active_requests, info.clients) == (1, 2)
    stream.cancel()


def test_a_client_is_known_for_a_while_after_its_last_call() -> None:
    clock = Clock()
    clients = Clients(clock)
    with clients.calling("a"), clients.calling("a"), clients.calling("b"):
        clock.now += 2 * MEMORY_S
        assert clients.count() == 2
    clock.now += MEMORY_S / 2
    with clients.calling("c"):
        assert clients.count() == 3
        clock.now += MEMORY_S
        assert clients.count() == 1
