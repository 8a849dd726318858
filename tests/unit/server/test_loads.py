"""Loads of a repository on the hub: who shares what, with a store that the test steers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from loaderd.server.errors import DrainingError, UnsupportedOptionError
from loaderd.server.models.idle import IdleModels
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import LoadProgress, Loads, OnDemand, outcome
from loaderd.server.models.planner import Planner
from loaderd.server.models.record import LoadOptions, ModelRecord
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.where import Where
from loaderd.server.single_flight import Publish, SingleFlight
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.pins import Pin, Pins
from loaderd.server.store.resolve import CachedSnapshot, NotCached
from loaderd.server.store.store import DownloadProgress, DownloadState, ModelStore
from loaderd.server.supervisor.offload_folders import OffloadFolders
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits
from tests.fake_worker import FakeLauncher

OLD, NEW = "a" * 40, "b" * 40
LIMITS = WorkerLimits(standby=0, load_timeout=20, heartbeat_timeout=60, max_stream_bytes=1024)


@dataclass
class SteeredStore:
    """Knows which commit each revision is, and downloads when it is let."""

    folder: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": OLD, "v1": OLD})
    cached: set[str] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    pins: Pins = field(default_factory=Pins)
    flights: SingleFlight[HubName, DownloadState, CachedSnapshot] = field(
        default_factory=SingleFlight
    )

    async def resolve(self, name: HubName | LocalName) -> CachedSnapshot | NotCached:
        assert isinstance(name, HubName)
        commit = self.revisions.get(name.revision, name.revision)
        return self._snapshot(name, commit) if commit in self.cached else NotCached(name)

    def download(self, name: HubName) -> Any:
        async def work(publish: Publish[DownloadState]) -> CachedSnapshot:
            publish(DownloadState(None, DownloadProgress(0, 10, 0, 1, 0.0)))
            await self.gate.wait()
            commit = self.revisions.get(name.revision, name.revision)
            self.cached.add(commit)
            return self._snapshot(name, commit)

        return self.flights.join(name, work)

    async def hold(self, files: CachedSnapshot, holder: str) -> Pin:
        return self.pins.hold(files.repo_id, files.commit, holder)

    async def prove(self, files: CachedSnapshot, publish: Any) -> None:
        pass

    def allows_pickle(self, _name: HubName | LocalName) -> bool:
        return False

    def _snapshot(self, name: HubName, commit: str) -> CachedSnapshot:
        folder = make_model(self.folder / commit)
        return CachedSnapshot(name.repo_id, name.revision, commit, folder, 10)


def make_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@dataclass
class Box:
    launcher: FakeLauncher
    registry: ModelRegistry
    store: SteeredStore
    loads: Loads

    async def load(self, name: str) -> ModelRecord:
        async with aclosing(self.loads.load(name, LoadOptions())) as updates:
            async for update in updates:
                if not isinstance(update, LoadProgress):
                    return update
        raise AssertionError("a load ends with the model")

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0.01)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with AsyncExitStack() as stack:
        launcher = FakeLauncher()
        supervisor = Supervisor(tmp_path, launcher, LIMITS)
        await supervisor.start()
        stack.push_async_callback(supervisor.close)
        registry, store = ModelRegistry(4), SteeredStore(tmp_path)
        models = cast(ModelStore, store)
        loads = Loads(
            registry,
            models,
            supervisor,
            Planner(models, supervisor, IdleModels(registry), OffloadFolders(tmp_path)),
            OnDemand.OFF,
        )
        yield Box(launcher, registry, store, loads)
        launcher.load_gate.set()
        await registry.close()


async def test_the_first_who_asked_may_leave_after_the_download(box: Box) -> None:
    box.launcher.load_gate.clear()
    first = asyncio.create_task(box.load("org/name"))
    await box.settle()
    box.store.gate.set()
    await box.settle()
    second = asyncio.create_task(box.load("org/name"))  # finds the snapshot, joins its load
    await box.settle()
    first.cancel()
    await box.settle()
    assert [view.state for view in box.registry.views()] == [ModelState.LOADING]
    box.launcher.load_gate.set()
    record = await second
    assert record.state is ModelState.READY
    assert box.launcher.loads == 1


async def test_the_last_who_leaves_stops_download_and_load(box: Box) -> None:
    waiting = asyncio.create_task(box.load("org/name"))
    await box.settle()
    assert [view.state for view in box.registry.views()] == [ModelState.DOWNLOADING]
    waiting.cancel()
    await box.settle()
    assert box.registry.views() == []

    box.store.gate.set()
    box.launcher.load_gate.clear()
    waiting = asyncio.create_task(box.load("org/name"))
    await box.settle()
    waiting.cancel()
    await box.settle()
    assert box.registry.views() == []
    assert box.launcher.workers[0].exited


async def test_every_name_that_was_loaded_names_the_model(box: Box) -> None:
    box.store.gate.set()
    box.launcher.load_gate.clear()
    names = ["org/name", "org/name@v1", f"org/name@{OLD}"]
    loads = [asyncio.create_task(box.load(name)) for name in names]
    await box.settle()
    box.launcher.load_gate.set()
    records = await asyncio.gather(*loads)
    assert len({record.id for record in records}) == 1
    for name in names:
        assert box.registry.find(name) is records[0]
        assert name in box.registry.view(records[0]).aliases


async def test_a_branch_that_moved_names_what_it_is_now(box: Box) -> None:
    box.store.gate.set()
    old = await box.load("org/name")
    box.store.revisions["main"] = NEW
    new = await box.load("org/name")
    assert old is not new
    assert box.registry.find("org/name") is new
    assert box.registry.find(f"org/name@{OLD}") is old
    assert box.registry.find(f"org/name@{NEW}") is new


async def test_draining_tells_a_load_that_downloads(box: Box) -> None:
    waiting = asyncio.create_task(box.load("org/name"))
    await box.settle()
    await box.registry.drain(0)
    await box.registry.close()
    with pytest.raises(DrainingError):
        await waiting


async def test_a_model_holds_its_snapshot_until_it_is_gone(box: Box) -> None:
    box.store.cached.add(OLD)
    record = await box.load("org/name")
    assert box.store.pins.holders("org/name", OLD) == (record.id,)
    await box.registry.unload(record.id, force=False)
    assert box.store.pins.holders("org/name", OLD) == ()


async def test_a_load_that_ends_early_lets_go_of_its_snapshot(box: Box) -> None:
    box.store.cached.add(OLD)
    box.launcher.load_gate.clear()
    loading = asyncio.create_task(box.load("org/name"))
    await box.settle()
    assert len(box.store.pins.holders("org/name", OLD)) == 1
    loading.cancel()
    await box.settle()
    assert box.store.pins.holders("org/name", OLD) == ()


async def test_a_device_that_is_not_there_is_refused_before_anything_is_downloaded(
    box: Box,
) -> None:
    options = LoadOptions(where=Where("cuda:7"))
    with pytest.raises(UnsupportedOptionError, match="no device 'cuda:7'"):
        await outcome(box.loads.load("org/name", options))
    assert box.store.flights.flights == {}
    assert box.registry.views() == []
