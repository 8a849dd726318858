"""Loads and the memory that they reserve, on a box with two small accelerators."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loaderd.server.errors import (
    DeviceMemoryError,
    ModelUnsupportedError,
    SnapshotNotFoundError,
    UnsupportedOptionError,
)
from loaderd.server.models import planner
from loaderd.server.models.idle import IdleModels
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.planner import Planner
from loaderd.server.models.record import LoadOptions, ModelRecord
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.where import Where
from loaderd.server.store.store import ModelStore, StoreSettings
from loaderd.server.supervisor.offload_folders import OffloadFolders
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import Worker, WorkerLimits
from loaderd.v1 import model_pb2, system_pb2
from tests.fake_worker import FakeLauncher
from tests.waiting import until_in_loop as until

MIB = 1 << 20
ROOM = 1000 * MIB
"""What an accelerator holds: one of the models below, beside the context of a driver."""


@dataclass
class Box:
    launcher: FakeLauncher
    registry: ModelRegistry
    planner: Planner
    loads: Loads
    folder: Path

    async def load(
        self, name: str, options: LoadOptions | None = None, replicas: int | None = None
    ) -> ModelRecord:
        loading = self.loads.load(
            str(self.folder / name), options or LoadOptions(), replicas=replicas
        )
        async with aclosing(loading) as updates:
            async for update in updates:
                if isinstance(update, ModelRecord):
                    return update
        raise AssertionError("a load ends with the model")

    async def held(self) -> dict[str, list[str]]:
        return {
            device.id: [Path(holder.name).name for holder in device.holders]
            for device in await self.planner.devices()
        }


def gpu(index: int) -> system_pb2.Device:
    return system_pb2.Device(
        id=f"cuda:{index}",
        type=system_pb2.DEVICE_TYPE_CUDA,
        total_bytes=ROOM,
        free_bytes=ROOM,
    )


def make_model(folder: Path, numbers: int = 4 * MIB) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text('{"model_type": "llama"}' if name == "config.json" else "{}")
    layout = {"dtype": "F16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}
    header = json.dumps({"q_proj.weight": layout}).encode()
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(struct.pack("<Q", len(header)) + header)
        weights.truncate(weights.tell() + 2 * numbers)  # zeros that take no room
    return folder


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with AsyncExitStack() as stack:
        launcher = FakeLauncher()
        launcher.devices = [gpu(0), gpu(1), *launcher.devices]
        limits = WorkerLimits(
            standby=1, load_timeout=20, heartbeat_timeout=60, max_stream_bytes=1 << 18
        )
        supervisor = Supervisor(tmp_path, launcher, limits)
        await supervisor.start()
        stack.push_async_callback(supervisor.close)
        store = ModelStore(
            StoreSettings(
                cache_dir=tmp_path / "cache",
                local_roots=(tmp_path,),
                hub_endpoint="http://127.0.0.1:1",
                hub_token=None,
                offline=True,
                stall_timeout=20,
            )
        )
        registry = ModelRegistry(4, keep_alive_s=600)
        plans = Planner(store, supervisor, IdleModels(registry), OffloadFolders(tmp_path / "disk"))
        for name in ("a", "b", "c"):
            make_model(tmp_path / name)
        loads = Loads(registry, store, supervisor, plans, OnDemand.OFF)
        yield Box(launcher, registry, plans, loads, tmp_path)
        launcher.load_gate.set()
        await registry.close()
        await store.close()


async def test_a_plan_says_where_what_and_of_which_type_and_reserves_nothing(box: Box) -> None:
    plan = await box.planner.plan(str(box.folder / "a"), LoadOptions())
    assert plan.placement.fits
    assert plan.estimate.needs.weights == 8 * MIB
    assert plan.dtype.dtype == model_pb2.DTYPE_FLOAT16
    assert plan.placement.devices == {"cuda:0": plan.placement.needed_bytes}
    assert plan.estimate.unknown
    assert await box.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}
    assert box.launcher.loads == 0


async def test_the_dtype_that_is_asked_for_is_planned(box: Box) -> None:
    options = LoadOptions(dtype=model_pb2.DTYPE_FLOAT32, where=Where("cpu"))
    plan = await box.planner.plan(str(box.folder / "a"), options)
    assert plan.estimate.needs.weights == 16 * MIB
    assert list(plan.placement.devices) == ["cpu"]


async def test_what_is_not_in_the_cache_is_said(box: Box) -> None:
    with pytest.raises(SnapshotNotFoundError):
        await box.planner.plan("org/name", LoadOptions())


async def test_loads_at_once_get_an_accelerator_each_and_the_third_is_refused(box: Box) -> None:
    box.launcher.load_gate.clear()
    loads = [asyncio.create_task(box.load(name)) for name in ("a", "b")]
    await until(lambda: box.launcher.loads == 2)
    with pytest.raises(DeviceMemoryError) as caught:
        await box.load("c")
    assert caught.value.needed_bytes is not None
    assert caught.value.free_bytes is not None
    assert caught.value.needed_bytes > caught.value.free_bytes
    assert str(box.folder / "a")[:20] in str(caught.value.holders)
    assert box.launcher.loads == 2  # it was given no worker
    assert await box.held() in (
        {"cuda:0": ["a"], "cuda:1": ["b"], "cpu": []},
        {"cuda:0": ["b"], "cuda:1": ["a"], "cpu": []},
    )
    maps = {worker.loads[0].options.device_map for worker in box.launcher.workers if worker.loads}
    assert maps == {"cuda:0", "cuda:1"}
    box.launcher.load_gate.set()
    await asyncio.gather(*loads)


async def test_the_cpu_is_used_beside_accelerators_when_it_is_asked_for(box: Box) -> None:
    await box.load("a", LoadOptions(where=Where("cpu")))
    assert (await box.held())["cpu"] == ["a"]


async def test_what_a_load_has_taken_is_not_counted_twice(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = system_pb2.Device(id="cpu", total_bytes=1000 * MIB, free_bytes=1000 * MIB)
    copy = system_pb2.Device.FromString
    monkeypatch.setattr(planner, "cpu", lambda: copy(main.SerializeToString()))
    box.launcher.load_gate.clear()
    load = asyncio.create_task(box.load("a", LoadOptions(where=Where("cpu"))))
    await until(lambda: box.launcher.loads == 1)
    before = (await box.planner.devices())[-1]
    assert before.available_bytes == 1000 * MIB - before.reserved_bytes
    box.launcher.workers[0].beat(own_bytes=30 * MIB)
    main.free_bytes -= 30 * MIB
    for _ in range(100):
        after = (await box.planner.devices())[-1]
        if after.available_bytes == before.available_bytes:
            break
        await asyncio.sleep(0.01)
    assert after.available_bytes == before.available_bytes
    assert after.reserved_bytes == before.reserved_bytes
    box.launcher.load_gate.set()
    await load


async def test_a_loaded_model_holds_what_it_took_until_it_is_unloaded(box: Box) -> None:
    box.launcher.held_bytes = {"cuda:0": 100 * MIB, "cpu": MIB}
    record = await box.load("a")
    assert record.details is not None
    assert record.details.memory_bytes == 101 * MIB
    assert record.details.planned_bytes > 8 * MIB
    first, _, cpu = await box.planner.devices()
    assert first.reserved_bytes > 100 * MIB
    assert first.available_bytes == ROOM - first.reserved_bytes
    assert [holder.model_id for holder in first.holders] == [record.id]
    assert cpu.reserved_bytes == MIB
    await box.registry.unload(record.id, force=False)
    assert await box.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}


async def test_a_worker_that_dies_gives_its_memory_back(box: Box) -> None:
    await box.load("a")
    box.launcher.workers[0].kill()
    await until(lambda: bool(box.registry.views()[0].failure))
    assert await box.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}


async def test_a_load_that_fails_or_is_given_up_gives_its_memory_back(box: Box) -> None:
    box.launcher.load_error = ModelUnsupportedError(model="a", problem="x")
    with pytest.raises(ModelUnsupportedError):
        await box.load("a")
    assert await box.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}
    box.launcher.load_error = None
    box.launcher.load_gate.clear()
    load = asyncio.create_task(box.load("a"))
    await until(lambda: box.launcher.loads == 2)
    assert (await box.held())["cuda:0"] == ["a"]
    load.cancel()
    await until(lambda: not box.registry.held(str(box.folder / "a"), LoadOptions()))
    assert await box.held() == {"cuda:0": [], "cuda:1": [], "cpu": []}


async def test_a_failed_load_keeps_its_memory_while_its_worker_lives(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose driver does not let go of it: whoever ends it does not wait for ever."""

    async def kill_in_vain(_worker: Worker) -> None:
        pass

    monkeypatch.setattr(Worker, "kill", kill_in_vain)
    box.launcher.load_error = ModelUnsupportedError(model="a", problem="x")
    with pytest.raises(ModelUnsupportedError):
        await box.load("a")
    assert await box.held() == {"cuda:0": ["a"], "cuda:1": [], "cpu": []}
    box.launcher.load_error = None
    assert (await box.load("a")).state is ModelState.READY
    assert await box.held() == {"cuda:0": ["a"], "cuda:1": ["a"], "cpu": []}
    box.launcher.workers[0].kill()
    await until(lambda: box.launcher.workers[0].exited)
    for _ in range(100):
        if (await box.held())["cuda:0"] == []:
            break
        await asyncio.sleep(0.01)
    assert await box.held() == {"cuda:0": [], "cuda:1": ["a"], "cpu": []}


async def test_a_device_that_the_box_lacks_is_refused_before_a_worker_is_taken(box: Box) -> None:
    with pytest.raises(UnsupportedOptionError):
        await box.load("a", LoadOptions(where=Where("cuda:2")))
    assert box.launcher.loads == 0


async def test_the_least_recently_used_model_goes_for_another_one(box: Box) -> None:
    first, second = await box.load("a"), await box.load("b")
    with box.registry.use(first.id):
        pass  # so that the second one was used less recently
    third = await box.load("c")
    assert third.state is ModelState.READY
    assert second.state is ModelState.UNLOADED
    assert second.leaving is ChangeReason.EVICTED
    assert first.state is ModelState.READY
    assert await box.held() == {"cuda:0": ["a"], "cuda:1": ["c"], "cpu": []}


async def test_what_is_used_held_or_pinned_does_not_go(box: Box) -> None:
    first, second = await box.load("a"), await box.load("b")
    lease = box.registry.leases.acquire(first.id, 60)
    with box.registry.use(second.id), pytest.raises(DeviceMemoryError) as caught:
        await box.load("c")
    assert "/a (" in str(caught.value.holders)
    assert "/b (" in str(caught.value.holders)
    box.registry.keep(second, PINNED)
    with pytest.raises(DeviceMemoryError):
        await box.load("c")
    assert {first.state, second.state} == {ModelState.READY}
    box.registry.leases.release(lease.id)
    await box.load("c")
    assert first.state is ModelState.UNLOADED
    assert second.state is ModelState.READY


async def test_nothing_goes_for_what_would_not_fit_anyway(box: Box) -> None:
    first, second = await box.load("a"), await box.load("b")
    make_model(box.folder / "huge", numbers=1024 * MIB)
    with pytest.raises(DeviceMemoryError):
        await box.load("huge")
    assert {first.state, second.state} == {ModelState.READY}


async def test_a_load_waits_for_a_model_that_is_being_unloaded(box: Box) -> None:
    first, _ = await box.load("a"), await box.load("b")
    with box.registry.use(first.id):
        unload = asyncio.create_task(box.registry.unload(first.id, force=True, grace_s=60))
        await until(lambda: first.state is ModelState.UNLOADING)
        (other,) = IdleModels(box.registry).evictable()
        box.registry.keep(box.registry.find(other), PINNED)
        load = asyncio.create_task(box.load("c"))
        await asyncio.sleep(0.1)
        assert not load.done()
    await unload
    assert (await load).state is ModelState.READY


LAYER = 2 * MIB
LAYERS = 8


@pytest.fixture
def deep(box: Box) -> Path:
    """A model of layers that no device of the box holds alone; 768 MiB of each are the context."""
    folder = make_model(box.folder / "deep")
    names = [f"model.layers.{index}.mlp.weight" for index in range(LAYERS)]
    save_file({name: np.zeros(MIB, np.float16) for name in names}, folder / "model.safetensors")
    for device in box.launcher.devices[:2]:
        device.total_bytes = device.free_bytes = (768 + 14) * MIB
    return folder


def last_load(box: Box) -> Any:
    return [load for worker in box.launcher.workers for load in worker.loads][-1]


async def test_a_spread_load_may_use_what_was_reserved_and_no_more(box: Box, deep: Path) -> None:
    plan = (await box.planner.plan(str(deep), LoadOptions(where=Where("balanced")))).placement
    assert plan.devices.keys() == {"cuda:0", "cuda:1"}
    box.launcher.load_gate.clear()
    first = asyncio.create_task(box.load("deep", LoadOptions(where=Where("balanced"))))
    await until(lambda: box.launcher.loads == 1)
    load = last_load(box)
    assert load.options.device_map == "sequential"
    assert dict(load.weight_room) == dict(plan.weight_room)
    for device, room in load.weight_room.items():
        assert room <= plan.devices[device] - 768 * MIB
    assert sum(load.weight_room.values()) >= LAYERS * LAYER
    assert load.offload_folder == ""
    with pytest.raises(DeviceMemoryError) as caught:
        await box.load("deep", LoadOptions(where=Where("sequential")))
    assert "/deep (" in str(caught.value.holders)
    reserved = {each.id: each.reserved_bytes for each in await box.planner.devices()}
    assert reserved == {**plan.devices, "cpu": 0}
    box.launcher.load_gate.set()
    await first


async def test_nothing_is_offloaded_unless_it_may_be(
    box: Box, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = system_pb2.Device(id="cpu", total_bytes=1000 * MIB, free_bytes=1000 * MIB)
    copy = system_pb2.Device.FromString
    monkeypatch.setattr(planner, "cpu", lambda: copy(main.SerializeToString()))
    with pytest.raises(DeviceMemoryError) as caught:
        await box.load("deep", LoadOptions(where=Where("cuda:1")))
    assert caught.value.free_bytes == (768 + 14) * MIB
    assert box.launcher.loads == 0
    options = LoadOptions(where=Where("cuda:1", offload=model_pb2.OFFLOAD_CPU))
    plan = (await box.planner.plan(str(deep), options)).placement
    assert plan.devices.keys() == {"cuda:1", "cpu"}
    assert 0 < plan.offloaded["cpu"] < LAYERS * LAYER
    await box.load("deep", options)
    load = last_load(box)
    assert dict(load.weight_room) == dict(plan.weight_room)
    assert (load.options.offload, load.offload_folder) == (model_pb2.OFFLOAD_CPU, "")
    main.free_bytes = 100 * MIB
    with pytest.raises(DeviceMemoryError):
        await box.load("deep", LoadOptions(where=Where("cuda:0", offload=model_pb2.OFFLOAD_CPU)))


def is_there(folder: Path) -> bool:
    return folder.is_dir()


async def test_a_load_that_uses_the_disk_has_a_folder_until_it_is_gone(
    box: Box, deep: Path
) -> None:
    bounds = (("cpu", 0),)
    where = Where("cuda:0", max_memory=bounds, offload=model_pb2.OFFLOAD_DISK)
    plan = (await box.planner.plan(str(deep), LoadOptions(where=where))).placement
    assert plan.devices.keys() == {"cuda:0"}
    assert 0 < plan.offloaded["disk"] < LAYERS * LAYER
    record = await box.load("deep", LoadOptions(where=where))
    folder = Path(last_load(box).offload_folder)
    assert is_there(folder)
    assert folder.is_relative_to(box.folder / "disk")
    assert dict(last_load(box).options.max_memory) == {"cpu": 0}
    await box.registry.unload(record.id, force=False)
    await until(lambda: not is_there(folder))
    box.launcher.load_error = DeviceMemoryError("deep")
    with pytest.raises(DeviceMemoryError) as caught:
        await box.load("deep", LoadOptions(where=where))
    assert caught.value.needed_bytes == plan.needed_bytes
    assert not is_there(Path(last_load(box).offload_folder))


async def test_a_module_map_is_planned_by_the_sizes_of_its_modules(box: Box, deep: Path) -> None:
    modules = {f"model.layers.{index}": f"cuda:{index % 2}" for index in range(LAYERS)}
    where = Where(module_map=tuple(sorted({**modules, "model.layers.7": "disk"}.items())))
    plan = (await box.planner.plan(str(deep), LoadOptions(where=where))).placement
    taken = {device: count - 768 * MIB for device, count in plan.devices.items()}
    assert 4 * LAYER < taken["cuda:0"] < 6 * LAYER  # what is offloaded is computed there
    assert 3 * LAYER < taken["cuda:1"] < 4 * LAYER
    assert plan.offloaded == {"disk": LAYER}
    record = await box.load("deep", LoadOptions(where=where))
    load = last_load(box)
    assert load.options.module_map["model.layers.7"] == "disk"
    assert not load.options.HasField("device_map")
    assert load.offload_folder
    other = await box.load("deep", LoadOptions(where=Where("cpu")))
    assert other.id != record.id


async def test_bounds_of_devices_hold(box: Box) -> None:
    where = Where("cuda:0", max_memory=(("cuda:0", 500 * MIB),))
    with pytest.raises(DeviceMemoryError) as caught:
        await box.load("a", LoadOptions(where=where))
    assert caught.value.free_bytes == 500 * MIB
    where = Where("auto", max_memory=(("cuda:0", 0),))
    plan = (await box.planner.plan(str(box.folder / "a"), LoadOptions(where=where))).placement
    assert list(plan.devices) == ["cuda:1"]
    with pytest.raises(UnsupportedOptionError, match="'cuda:5'"):
        await box.load("a", LoadOptions(where=Where(max_memory=(("cuda:5", 1),))))


async def test_a_load_does_not_wait_for_a_model_whose_memory_would_not_help(box: Box) -> None:
    first, second = await box.load("a"), await box.load("b")
    with box.registry.use(first.id):
        unload = asyncio.create_task(box.registry.unload(first.id, force=True, grace_s=3600))
        await until(lambda: first.state is ModelState.UNLOADING)
        device_map = "cuda:1" if (await box.held())["cuda:1"] == ["b"] else "cuda:0"
        async with asyncio.timeout(20):
            third = await box.load("c", LoadOptions(where=Where(device_map)))
        assert (second.state, third.state) == (ModelState.UNLOADED, ModelState.READY)
        box.registry.keep(third, PINNED)
        with pytest.raises(DeviceMemoryError):
            await box.load("b", LoadOptions(where=Where(device_map)))
        assert first.state is ModelState.UNLOADING
    await unload
