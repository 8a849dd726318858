"""A daemon's insides on a simulated box: all of them real but store, workers, devices and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import cast
from unittest.mock import patch

from loaderd.server.access.quotas import Quotas
from loaderd.server.models import planner
from loaderd.server.models.idle import IdleModels, IdleUnloader
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.placement import DeviceBook
from loaderd.server.models.planner import Claim, Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.restarts import Restarts
from loaderd.server.rpc.generation_service import GenerationService
from loaderd.server.rpc.health import Health
from loaderd.server.rpc.model_service import ModelService
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor import supervisor, worker
from loaderd.server.supervisor.offload_folders import OffloadFolders
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import Worker, WorkerLimits
from tests.simulation.hardware import Card, Hardware
from tests.simulation.loop import Clock
from tests.simulation.store import SimulatedStore
from tests.simulation.workers import Grant, SimulatedLauncher, SimulatedLinks

MAX_REQUESTS = 4
KEEP_ALIVE_S = 300.0
LOAD_TIMEOUT_S = 120.0
HEARTBEAT_TIMEOUT_S = 60.0
_WATCH_INTERVAL_S = 5.0


class SimulatedDaemon:
    """One daemon from start to exit.

    Args:
        hardware: Its box.
        clock: Its time.
        random: How long everything takes.
        standby: Number of spare workers.
        on_demand: What requests for text may load.
    """

    def __init__(
        self, hardware: Hardware, clock: Clock, random: Random, standby: int, on_demand: OnDemand
    ) -> None:
        self.hardware = hardware
        self.launcher = SimulatedLauncher(hardware, clock, random)
        self.store = SimulatedStore(max(card.total_bytes for card in hardware.cards), random)
        self.standby = standby
        self._on_demand = on_demand

    async def start(self) -> None:
        """As `Daemon.run` until it listens."""
        limits = WorkerLimits(
            standby=self.standby,
            load_timeout=LOAD_TIMEOUT_S,
            heartbeat_timeout=HEARTBEAT_TIMEOUT_S,
            max_stream_bytes=1 << 18,
        )
        store = cast(ModelStore, self.store)
        with patch.object(supervisor, "LinkServer", partial(SimulatedLinks, self.launcher)):
            self.supervisor = Supervisor(Path("/run/loaderd"), self.launcher, limits)
        self.registry = ModelRegistry(MAX_REQUESTS, KEEP_ALIVE_S)
        disk = OffloadFolders(Path("/run/loaderd/disk"))  # no load asks for it
        self.planner = Planner(store, self.supervisor, IdleModels(self.registry), disk)
        self.loads = Loads(self.registry, store, self.supervisor, self.planner, self._on_demand)
        self.restarts = Restarts(self.loads)
        self.registry.on_death = self.restarts.begin
        self.models = ModelService(self.registry, self.loads, self.planner)
        self.generation = GenerationService(self.registry, self.loads, Quotas(time.monotonic))
        self.health = Health(self.registry, ())
        await self.supervisor.start()
        self._background = [
            asyncio.create_task(work)
            for work in (IdleUnloader(self.registry).run(), self.health.follow())
        ]

    async def stop(self, patience_s: float) -> None:
        """As `Daemon.run` from the signal on."""
        await self.registry.drain(patience_s)
        for task in self._background:
            task.cancel()
        await self.restarts.close()
        await self.registry.close()
        await self.supervisor.close()

    @property
    def book(self) -> WatchedBook:
        """What it believes of its devices."""
        return cast(WatchedBook, self.planner._book)

    @contextmanager
    def disguised(self, clock: Clock) -> Iterator[None]:
        """Puts the box where the daemon looks for its own."""

        class GrantedClaim(Claim):
            def begun(claim, worker: Worker) -> None:  # noqa: N805 - `self` is the daemon
                super().begun(worker)
                grant = Grant(claim._placement.devices, claim._needs)
                self.launcher.grant(worker.pid, grant)

        with ExitStack() as patches:
            for where, name, stand_in in (
                (time, "monotonic", clock),
                (planner, "read_shape", self.store.shape),
                (planner, "cpu", self.hardware.cpu),
                (planner, "Claim", GrantedClaim),
                (planner, "DeviceBook", partial(WatchedBook, self.hardware)),
                (worker, "_WATCH_INTERVAL_S", _WATCH_INTERVAL_S),
            ):
                patches.enter_context(patch.object(where, name, stand_in))
            yield


class WatchedBook(DeviceBook):
    """Checks after each change that nothing was given out twice.

    Args:
        hardware: What is really there.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware
        self.problems: list[str] = []
        self._untold: list[tuple[float, str, int]] = []

    def reserve(self, *args: object, **kwargs: object) -> None:
        super().reserve(*args, **kwargs)  # type: ignore[arg-type]  # as they came
        self.check("reserve")

    def settle(self, *args: object, **kwargs: object) -> None:
        super().settle(*args, **kwargs)  # type: ignore[arg-type]  # as they came
        self.check("settle")

    def release(self, holder: str, now: float, share: int | None = None) -> None:
        before = dict(self._reservations)
        super().release(holder, now, share)
        for known in (before[key] for key in before.keys() - self._reservations.keys()):
            held, told = self._by_pool(known.bytes), self._by_pool(known.taken)
            self._untold += [(now, pool, held[pool] - told.get(pool, 0)) for pool in held]
        self.check("release")

    def untold(self, pool: str) -> int:
        """Bytes that models may have had when a memory was measured, beside what they told."""
        measured_at = self._measured_at(pool)
        self._untold = [each for each in self._untold if each[0] > self._measured_at(each[1])]
        return sum(
            count
            for when, where, count in self._untold
            if (where, when > measured_at) == (pool, True)
        )

    def check(self, after: str) -> None:
        """Compares it with the box."""
        for card in self.hardware.cards:
            if card.pool:
                continue
            reserved = sum(holder.bytes for holder in self.holders(card.id))
            if reserved > self._most(card):
                self.problems.append(f"{after}: {reserved} of {card.total_bytes} of {card.id}")
            if self.available(card.id) > max(self.hardware.free(card.id), 0):
                more = self.available(card.id) - self.hardware.free(card.id)
                self.problems.append(f"{after}: {card.id} has {more} bytes less than it says")

    def _most(self, card: Card) -> int:
        return card.total_bytes - card.others_bytes
