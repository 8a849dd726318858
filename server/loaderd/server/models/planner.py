"""Plans loads before they begin, and keeps what they reserve until their workers have ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from loaderd.server.box.cpu import CPU, cpu
from loaderd.server.box.dtype import DtypeChoice, choose_dtype, cpu_flags
from loaderd.server.errors import DeviceMemoryError, SnapshotNotFoundError, WorkerDiedError
from loaderd.server.models.eviction import to_evict
from loaderd.server.models.fitting import place
from loaderd.server.models.needs import Estimate, estimate
from loaderd.server.models.placement import DeviceBook, MemoryDevice, Placement, told
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.where import DISK, SEQUENTIAL
from loaderd.server.store.names import HubName, LocalName, parse_name
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder, NotCached
from loaderd.server.store.shape import read_shape
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.offload_folders import OffloadFolders
from loaderd.server.supervisor.supervisor import LoadedWorker
from loaderd.server.supervisor.worker import Worker
from loaderd.v1 import model_pb2
from loaderd.v1.model_pb2 import Dtype, Quantization
from loaderd.v1.system_pb2 import Device, DeviceType, MemoryHolder
from loaderd.worker.v1 import worker_pb2

_ITEM_SIZES = {Dtype.DTYPE_FLOAT16: 2, Dtype.DTYPE_BFLOAT16: 2, Dtype.DTYPE_FLOAT32: 4}

_BITS = {
    Quantization.QUANTIZATION_INT8: 8.5,
    Quantization.QUANTIZATION_INT4: 4.5,
    Quantization.QUANTIZATION_NF4: 4.5,
}
"""Of a number, with its share of the scales."""


class Inventory(Protocol):
    """Tells the devices of a box."""

    async def devices(self) -> Sequence[Device]:
        """The devices, accelerators first, with what was free of them at `measured_at`.

        Raises:
            WorkerDiedError: Nobody could look at them.
        """

    @property
    def measured_at(self) -> float:
        """Monotonic time before which nothing was measured of what `devices` says."""


class Evictable(Protocol):
    """The models that may be unloaded for others."""

    def evictable(self) -> Sequence[str]:
        """Ids of those that nobody uses, holds or has pinned; the least recently used first."""

    def leaving(self) -> Sequence[str]:
        """Ids of those that are being unloaded."""

    async def evict(self, model_ids: Sequence[str], newcomer: str) -> None:
        """Unloads models for another one and waits until their memory is free.

        Args:
            model_ids: Which, of those two.
            newcomer: For which, for the log.
        """


@dataclass(frozen=True)
class LoadPlan:
    """What a load would take, and where.

    Attributes:
        placement: Whether it fits, and where.
        estimate: What it is made of.
        dtype: The dtype that the model would have.
    """

    placement: Placement
    estimate: Estimate
    dtype: DtypeChoice


class Claim:
    """The memory of one load, from its plan until its worker has ended.

    Args:
        book: Where it is reserved.
        model_id: For which model.
        plan: What it is to take.
        disk: Where its folder for weights on the disk is, if it gets one.
    """

    def __init__(
        self, book: DeviceBook, model_id: str, plan: LoadPlan, disk: OffloadFolders
    ) -> None:
        self._book = book
        self._id = model_id
        self._plan = plan
        self._disk = disk
        self._worker: Worker | None = None
        self._held_before = 0

    def load(self, options: LoadOptions) -> worker_pb2.Load:
        """What the worker is to be asked for, as far as the plan says it.

        Where layers are spread, accelerate fills one device after the other with them, up to the
        room that the plan gives each.

        Args:
            options: What the client asked for.
        """
        placement, where = self._plan.placement, options.where
        asked = model_pb2.LoadOptions(
            dtype=options.dtype,
            quantization=options.quantization,
            module_map=where.modules,
            max_memory=where.bounds,
            offload=where.offload,
        )
        if not where.module_map:
            is_spread = bool(placement.weight_room)
            asked.device_map = SEQUENTIAL if is_spread else next(iter(placement.devices))
        uses_disk = DISK in placement.offloaded
        return worker_pb2.Load(
            options=asked,
            weight_room=placement.weight_room,
            offload_folder=str(self._disk.make(self._id)) if uses_disk else "",
        )

    def begun(self, worker: Worker) -> None:
        """Notes which worker takes the memory."""
        self._worker, self._held_before = worker, worker.link.own_bytes

    def note(self) -> None:
        """Notes what a load to the CPU has taken by its worker's last heartbeat."""
        if tuple(self._plan.placement.devices) == (CPU,):
            held = 0 if self._worker is None else self._worker.link.own_bytes
            taken = held - self._held_before
            most = self._plan.placement.devices[CPU]
            self._book.note(self._id, {CPU: min(max(taken, 0), most)}, time.monotonic())

    def settle(self, model: LoadedWorker) -> None:
        """Keeps what the loaded model holds until its worker ends, and tells it beside the plan."""
        loaded, needs = model.loaded, self._plan.estimate.needs
        devices = self._plan.placement.devices
        more = {
            device: needs.headroom
            + needs.margin // len(devices)
            + (needs.kv_cache if device == CPU else 0)
            for device in devices
        }
        self._book.settle(self._id, dict(loaded.held_bytes), more, time.monotonic())
        loaded.details.planned_bytes = self._plan.placement.needed_bytes
        loaded.details.memory_bytes = sum(loaded.held_bytes.values())
        model.worker.on_end(self.release)

    def told(self, error: DeviceMemoryError) -> DeviceMemoryError:
        """What a worker says of its memory, with what only the plan knows."""
        placement = self._plan.placement
        return DeviceMemoryError(
            error.model,
            placement.needed_bytes if error.needed_bytes is None else error.needed_bytes,
            placement.free_bytes if error.free_bytes is None else error.free_bytes,
            told(placement.holders),
        )

    def give_up(self) -> None:
        """Gives it back when the worker has ended, which the kernel may hold for long."""
        if self._worker is None or self._worker.ended:
            self.release()
            return
        # The model may be loaded again meanwhile.
        heir = f"{self._id}:{self._worker.pid}"
        self._book.hand_over(self._id, heir)
        self._worker.on_end(lambda: self._book.release(heir, time.monotonic()))
        self._disk.remove(self._id)

    def release(self) -> None:
        """Gives it back."""
        self._book.release(self._id, time.monotonic())
        self._disk.remove(self._id)


class Planner:
    """Says what loads need, and lets none begin that does not fit beside the others.

    Args:
        store: Where the models' files are.
        inventory: Tells the devices.
        idle: May go where a load does not fit beside them.
        disk: Where weights go that neither accelerators nor main memory hold.
    """

    def __init__(
        self, store: ModelStore, inventory: Inventory, idle: Evictable, disk: OffloadFolders
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._idle = idle
        self._disk = disk
        self._book = DeviceBook()
        self._loading: set[Claim] = set()

    async def plan(self, text: str, options: LoadOptions) -> LoadPlan:
        """What a load would take if it began now.

        Raises:
            SnapshotNotFoundError: The cache does not have the model.
            LoaderdError: The name is invalid, the files cannot be used, or the box has no such
                device.
        """
        name = parse_name(text)
        files = await self._store.resolve(name)
        if isinstance(files, NotCached):
            raise files.problem or SnapshotNotFoundError(model=text)
        return await self._plan(name, files, options)

    @asynccontextmanager
    async def claim(
        self,
        model_id: str,
        name: HubName | LocalName,
        files: LocalFolder | CachedSnapshot,
        options: LoadOptions,
    ) -> AsyncIterator[Claim]:
        """Reserves the memory of a load while it runs; `Claim.settle` keeps it when it is done.

        Where it does not fit, it waits for models that are being unloaded, if that helps, and
        unloads some that nobody uses.

        Raises:
            DeviceMemoryError: It does not fit beside the models that are in use.
            LoaderdError: As `plan`.
        """
        plan = await self._plan(name, files, options)
        while not plan.placement.fits:
            if not (going := self._to_evict(plan, options)):
                break
            await self._idle.evict(going, str(name))
            plan = await self._plan(name, files, options)
        plan.placement.check(str(name))
        self._book.reserve(model_id, str(name), plan.placement.devices)
        claim = Claim(self._book, model_id, plan, self._disk)
        self._loading.add(claim)
        try:
            yield claim
        except BaseException as error:
            claim.give_up()
            if isinstance(error, DeviceMemoryError):
                raise claim.told(error) from error
            raise
        finally:
            self._loading.discard(claim)

    async def devices(self) -> list[Device]:
        """All devices as they are now, with who has reserved what.

        Raises:
            WorkerDiedError: Nobody could look at them.
        """
        devices = await self._measure()
        for device in devices:
            holders = self._book.holders(device.id)
            device.available_bytes = self._book.available(device.id)
            device.reserved_bytes = sum(holder.bytes for holder in holders)
            device.taken_bytes = self._book.taken(device.id)
            device.holders.extend(
                MemoryHolder(model_id=each.id, name=each.name, bytes=each.bytes) for each in holders
            )
        return devices

    def _to_evict(self, plan: LoadPlan, options: LoadOptions) -> list[str]:
        going, needs = [*self._idle.leaving(), *self._idle.evictable()], plan.estimate.needs
        return to_evict(self._book, needs, options.where, going, time.monotonic())

    async def _plan(
        self, name: HubName | LocalName, files: LocalFolder | CachedSnapshot, options: LoadOptions
    ) -> LoadPlan:
        shape = await asyncio.to_thread(
            read_shape, files.path, str(name), allow_pickle=self._store.allows_pickle(name)
        )
        try:
            await self._measure()
        except WorkerDiedError as error:
            raise WorkerDiedError(model=str(name)) from error
        where = options.where
        accelerated = where.uses_accelerator([device.id for device in self._book.devices])
        dtype = choose_dtype(options.dtype, on_accelerator=accelerated, flags=cpu_flags())
        found = estimate(
            shape,
            _ITEM_SIZES[dtype.dtype],
            on_accelerator=accelerated,
            bits=_BITS.get(options.quantization),
            modules=where.modules,
        )
        return LoadPlan(place(self._book, found.needs, where), found, dtype)

    async def _measure(self) -> list[Device]:
        """Brings the book up to date: the CPU is looked at now, the others when a worker did."""
        seen = await self._inventory.devices()
        for claim in self._loading:
            claim.note()
        devices = [Device.FromString(each.SerializeToString()) for each in seen if each.id != CPU]
        devices.append(cpu())
        accelerators_at, now = self._inventory.measured_at, time.monotonic()
        self._book.measure(
            MemoryDevice(
                id=device.id,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
                measured_at=now if device.id == CPU else accelerators_at,
                shares=CPU if device.type == DeviceType.DEVICE_TYPE_MPS else "",
            )
            for device in devices
        )
        return devices
