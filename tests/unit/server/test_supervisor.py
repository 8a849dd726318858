import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from loaderd.server.errors import DeviceMemoryError, ModelUnsupportedError, WorkerDiedError
from loaderd.server.supervisor.launcher import WorkerProcess
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits
from loaderd.v1.generation_pb2 import StreamGenerateRequest
from loaderd.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fake_worker import FakeLauncher
from tests.waiting import until_in_loop as until

LIMITS = WorkerLimits(standby=1, load_timeout=20, heartbeat_timeout=1, max_stream_bytes=1 << 16)
LOAD = worker_pb2.Load(path="/model", model="org/name")


@pytest.fixture
async def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
async def supervisor(launcher: FakeLauncher, tmp_path: Path) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(tmp_path, launcher, LIMITS)
    await supervisor.start()
    yield supervisor
    await supervisor.close()


async def texts(worker_text: str, loaded: object) -> list[str]:
    request = StreamGenerateRequest(model="org/name", request_id="r", text=worker_text)
    with loaded.worker.link.generate(request, lambda: None) as stream:  # type: ignore[attr-defined]
        return [message.delta.text async for message in stream if message.HasField("delta")]


async def test_a_spare_takes_the_load_and_the_next_spare_starts(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    await until(lambda: supervisor.standby_workers == 1)
    loaded = await supervisor.load(LOAD)
    assert loaded.worker.pid == launcher.workers[0].pid
    assert "".join(await texts("count 3", loaded)) == "0 1 2 "
    await until(lambda: supervisor.standby_workers == 1)
    assert len(launcher.workers) == 2


async def test_devices_wait_for_the_first_worker(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    assert [device.id for device in await supervisor.devices()] == ["cpu"]
    assert supervisor.versions["torch"] == "0"


async def test_who_asks_for_devices_at_once_does_not_make_one_spare_too_many(
    launcher: FakeLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launcher.launch

    async def launch_slowly(*arguments: str) -> WorkerProcess:
        await asyncio.sleep(0.05)
        return await launch(*arguments)

    monkeypatch.setattr(launcher, "launch", launch_slowly)
    supervisor = Supervisor(tmp_path, launcher, LIMITS)
    await supervisor.start()
    await asyncio.sleep(0.01)  # the first spare is on its way
    await supervisor.devices()
    workers = len(launcher.workers)
    await supervisor.close()
    assert workers == 1


async def test_a_launch_that_is_given_up_is_not_waited_for(
    launcher: FakeLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = WorkerLimits(standby=0, load_timeout=20, heartbeat_timeout=5, max_stream_bytes=1024)
    supervisor = Supervisor(tmp_path, launcher, limits)
    await supervisor.start()
    begun = asyncio.Event()

    async def launch_slowly(*_: str) -> WorkerProcess:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(launcher, "launch", launch_slowly)
    load = asyncio.create_task(supervisor.load(LOAD))
    await begun.wait()
    load.cancel()
    await asyncio.wait([load])
    expected = dict(supervisor._server._expected)
    await supervisor.close()
    assert expected == {}


async def test_without_spares_a_load_starts_its_own_worker(
    launcher: FakeLauncher, tmp_path: Path
) -> None:
    limits = WorkerLimits(standby=0, load_timeout=20, heartbeat_timeout=5, max_stream_bytes=1024)
    supervisor = Supervisor(tmp_path, launcher, limits)
    await supervisor.start()
    assert launcher.workers == []
    assert [device.id for device in await supervisor.devices()] == ["cpu"]
    loaded = await supervisor.load(LOAD)
    assert "".join(await texts("count 2", loaded)) == "0 1 "
    await supervisor.close()


async def test_a_worker_that_dies_before_it_tells_the_devices_is_told_and_another_is_asked(
    launcher: FakeLauncher, tmp_path: Path
) -> None:
    limits = WorkerLimits(standby=0, load_timeout=20, heartbeat_timeout=5, max_stream_bytes=1024)
    supervisor = Supervisor(tmp_path, launcher, limits)
    await supervisor.start()
    launcher.standby_gate.clear()
    asking = asyncio.create_task(supervisor.devices())
    await until(lambda: bool(launcher.workers))
    launcher.workers[0].kill()
    with pytest.raises(WorkerDiedError):
        await asking
    launcher.standby_gate.set()
    assert [device.id for device in await supervisor.devices()] == ["cpu"]
    await supervisor.load(LOAD)
    assert len(launcher.workers) == 2  # the one that told of the devices took the load
    await supervisor.close()


async def test_a_failed_load_is_told_with_its_reason_and_ends_the_worker(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    launcher.load_error = ModelUnsupportedError(model="org/name", problem="no weights")
    with pytest.raises(ModelUnsupportedError, match="no weights"):
        await supervisor.load(LOAD)
    async with asyncio.timeout(10):
        await launcher.workers[0].wait()


async def test_a_worker_that_dies_in_load_is_told_as_such(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    launcher.dies_in_load = True
    with pytest.raises(WorkerDiedError, match="org/name"):
        await supervisor.load(LOAD)


async def test_a_load_that_takes_too_long_is_ended(launcher: FakeLauncher, tmp_path: Path) -> None:
    limits = WorkerLimits(standby=0, load_timeout=0.2, heartbeat_timeout=60, max_stream_bytes=1024)
    supervisor = Supervisor(tmp_path, launcher, limits)
    await supervisor.start()
    launcher.load_gate.clear()
    with pytest.raises(WorkerDiedError):
        await supervisor.load(LOAD)
    async with asyncio.timeout(10):
        await launcher.workers[0].wait()
    await supervisor.close()


async def test_cancelling_a_load_ends_its_worker(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    launcher.load_gate.clear()
    load = asyncio.create_task(supervisor.load(LOAD))
    await until(lambda: launcher.loads == 1)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    async with asyncio.timeout(10):
        await launcher.workers[0].wait()


async def test_the_death_of_a_worker_ends_its_streams_and_no_others(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    first = await supervisor.load(LOAD)
    second = await supervisor.load(LOAD)
    hanging = asyncio.create_task(texts("hang", first))
    await until(lambda: launcher.workers[0].running_requests == 1)
    with pytest.raises(WorkerDiedError):
        await texts("die", first)
    with pytest.raises(WorkerDiedError):
        await hanging
    with pytest.raises(WorkerDiedError):
        await texts("count 1", first)
    assert "".join(await texts("count 1", second)) == "0 "


async def test_a_worker_that_falls_silent_is_ended(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    loaded = await supervisor.load(LOAD)
    hanging = asyncio.create_task(texts("hang", loaded))
    await until(lambda: launcher.workers[0].running_requests == 1)
    launcher.workers[0].silent = True
    with pytest.raises(WorkerDiedError):
        async with asyncio.timeout(20):
            await hanging


async def test_leaving_a_stream_early_cancels_it_in_the_worker(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    loaded = await supervisor.load(LOAD)
    request = StreamGenerateRequest(model="org/name", request_id="r", text="hang")
    with loaded.worker.link.generate(request, lambda: None) as stream:
        async for _ in stream:
            break
    await until(lambda: len(launcher.workers[0].cancelled) == 1)
    assert launcher.workers[0].running_requests == 0


async def test_an_error_of_one_request_leaves_the_worker_alive(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    loaded = await supervisor.load(LOAD)
    with pytest.raises(DeviceMemoryError):
        await texts("fail", loaded)
    assert "".join(await texts("count 1", loaded)) == "0 "


async def test_a_standby_worker_that_dies_is_replaced(
    supervisor: Supervisor, launcher: FakeLauncher
) -> None:
    await until(lambda: supervisor.standby_workers == 1)
    launcher.workers[0].kill()
    await until(lambda: len(launcher.workers) == 2 and supervisor.standby_workers == 1)


async def test_a_stranger_cannot_attach(supervisor: Supervisor, tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/workers.sock") as channel:
        stub = worker_pb2_grpc.WorkerLinkServiceStub(channel)
        hello = worker_pb2.Hello(worker_id="unknown", token="")
        call = stub.Attach(iter([worker_pb2.AttachRequest(hello=hello)]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
