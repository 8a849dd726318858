"""Plans loads before they begin, and keeps what they reserve until their workers have ended."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from loaderd.server.box.cpu import CPU, cpu
from loaderd.server.box.dtype import DtypeChoice, choose_dtype, cpu_flags
from loaderd.server.errors import DeviceMemoryError, SnapshotNotFoundError, WorkerDiedError
from loaderd.server.models.eviction import to_evict
from loaderd.server.models.fitting import place_all, together
from loaderd.server.models.needs import Estimate, estimate
from loaderd.server.models.placement import DeviceBook, MemoryDevice, Needs, Placement
from loaderd.server.models.record import LoadOptions, ModelRecord
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

    async def dismissed(self) -> bool:
        """Waits for the end of replicas that are being ended; whether there were any."""

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
        replicas: Whether each fits, and where, up to the first one that does not.
        count: How many replicas there are to be.
        estimate: What each is made of.
        dtype: The dtype that the model would have.
    """

    replicas: Sequence[Placement]
    count: int
    estimate: Estimate
    dtype: DtypeChoice

    @property
    def placement(self) -> Placement:
        """Whether all replicas fit, and what they take together."""
        return together(self.replicas, self.count)


class Claim:
    """The memory of one replica, from its plan until its worker has ended.

    Args:
        book: Where it is reserved.
        model_id: For which model.
        share: Which of the model's shares it is.
        placement: Where it goes.
        needs: What it is to take.
        disk: Where its folder for weights on the disk is, if it gets one.
    """

    def __init__(
        self,
        book: DeviceBook,
        model_id: str,
        *,
        share: int,
        placement: Placement,
        needs: Needs,
        disk: OffloadFolders,
    ) -> None:
        self._book = book
        self._id = model_id
        self._share = share
        self._placement = placement
        self._needs = needs
        self._disk = disk
        self._worker: Worker | None = None
        self._held_before = 0

    @property
    def accelerators(self) -> list[str]:
        """The devices other than the CPU that it is on, in an order that all claims have."""
        return sorted(set(self._placement.devices) - {CPU})

    def load(self, options: LoadOptions) -> worker_pb2.Load:
        """What the worker is to be asked for, as far as the plan says it.

        Where layers are spread, accelerate fills one device after the other with them, up to the
        room that the plan gives each.

        Args:
            options: What the client asked for.
        """
        placement, where = self._placement, options.where
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
            offload_folder=str(self._disk.make(self._folder)) if uses_disk else "",
        )

    def begun(self, worker: Worker) -> None:
        """Notes which worker takes the memory."""
        self._worker, self._held_before = worker, worker.link.own_bytes

    def note(self) -> None:
        """Notes what a load to the CPU has taken by its worker's last heartbeat."""
        if tuple(self._placement.devices) == (CPU,):
            held = 0 if self._worker is None else self._worker.link.own_bytes
            taken = held - self._held_before
            most = self._placement.devices[CPU]
            noted = {CPU: min(max(taken, 0), most)}
            self._book.note(self._id, noted, time.monotonic(), self._share)

    def settle(self, model: LoadedWorker) -> None:
        """Keeps what the loaded model holds until its worker ends, and tells it beside the plan."""
        loaded, needs = model.loaded, self._needs
        devices = self._placement.devices
        more = {
            device: needs.headroom
            + needs.margin // len(devices)
            + (needs.kv_cache if device == CPU else 0)
            for device in devices
        }
        self._book.settle(self._id, dict(loaded.held_bytes), more, time.monotonic(), self._share)
        loaded.details.planned_bytes = self._placement.needed_bytes
        loaded.details.memory_bytes = sum(loaded.held_bytes.values())
        model.worker.on_end(self.release)

    def told(self, error: DeviceMemoryError) -> DeviceMemoryError:
        """What a worker says of its memory, with what only the plan knows."""
        return self._placement.refusal(error.model, error.needed_bytes, error.free_bytes)

    def give_up(self) -> None:
        """Gives it back when the worker has ended, which the kernel may hold for long."""
        if self._worker is None or self._worker.ended:
            self.release()
            return
        # The model may be loaded again meanwhile.
        heir = f"{self._id}:{self._worker.pid}"
        self._book.hand_over(self._id, heir, self._share)
        self._worker.on_end(lambda: self._book.release(heir, time.monotonic()))
        self._disk.remove(self._folder)

    def release(self) -> None:
        """Gives it back."""
        self._book.release(self._id, time.monotonic(), self._share)
        self._disk.remove(self._folder)

    @property
    def _folder(self) -> str:
        return f"{self._id}-{self._share}"


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
        self._shares = itertools.count()
        self._loading: set[Claim] = set()

    async def check(self, text: str, options: LoadOptions) -> None:
        """Refuses, before anything is done for it, a load to devices that the box does not have.

        Raises:
            UnsupportedOptionError: It names one.
            WorkerDiedError: Nobody could look at the devices.
        """
        if options.where.names_accelerators:
            options.where.check([device.id for device in await self._measured_for(text)])

    async def plan(self, text: str, options: LoadOptions, replicas: int = 1) -> LoadPlan:
        """What a load of so many replicas would take if it began now.

        Raises:
            SnapshotNotFoundError: The cache does not have the model.
            LoaderdError: The name is invalid, the files cannot be used, or the box has no such
                device.
        """
        name = parse_name(text)
        files = await self._store.resolve(name)
        if isinstance(files, NotCached):
            raise files.problem or SnapshotNotFoundError(model=text)
        return await self._plan(name, files, options, replicas)

    @asynccontextmanager
    async def claim(
        self, record: ModelRecord, count: int, least: int
    ) -> AsyncIterator[Sequence[Claim]]:
        """Reserves memory for replicas while they load; `Claim.settle` keeps it for those that do.

        Where they do not fit, it waits for models that are being unloaded, if that helps, and
        unloads some that nobody uses.

        Args:
            record: The model, whose files are found.
            count: How many replicas, at least 1.
            least: How many will do where not all of them fit.

        Yields:
            A claim for each that fits.

        Raises:
            DeviceMemoryError: They do not fit beside the models that are in use.
            LoaderdError: As `plan`.
        """
        name, files, options = record.name, record.files, record.options
        if files is None:
            raise RuntimeError("the files of a model are found before it is planned")
        plan = await self._plan(name, files, options, count, record.id)
        while not plan.placement.fits:
            if not await self._idle.dismissed():
                if not (going := self._to_evict(plan, options)):
                    break
                await self._idle.evict(going, str(name))
            plan = await self._plan(name, files, options, count, record.id)
        fitting = [placement for placement in plan.replicas if placement.fits]
        if len(fitting) < least:
            plan.placement.check(str(name))
        claims = [self._reserve(record, placement, plan) for placement in fitting]
        self._loading.update(claims)
        try:
            yield claims
        except BaseException:
            for claim in claims:
                claim.give_up()
            raise
        finally:
            self._loading.difference_update(claims)

    def _reserve(self, record: ModelRecord, placement: Placement, plan: LoadPlan) -> Claim:
        share = next(self._shares)
        self._book.reserve(record.id, str(record.name), placement.devices, share)
        return Claim(
            self._book,
            record.id,
            share=share,
            placement=placement,
            needs=plan.estimate.needs,
            disk=self._disk,
        )

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
        now = time.monotonic()
        return to_evict(self._book, needs, options.where, going, now, count=plan.count)

    async def _plan(
        self,
        name: HubName | LocalName,
        files: LocalFolder | CachedSnapshot,
        options: LoadOptions,
        count: int,
        model_id: str = "",
    ) -> LoadPlan:
        shape = await asyncio.to_thread(
            read_shape, files.path, str(name), allow_pickle=self._store.allows_pickle(name)
        )
        await self._measured_for(str(name))
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
        placements = place_all(self._book, found.needs, where, count, model_id)
        return LoadPlan(placements, count, found, dtype)

    async def _measured_for(self, model: str) -> list[Device]:
        """As `_measure`, for the load of a model, which an error names."""
        try:
            return await self._measure()
        except WorkerDiedError as error:
            raise WorkerDiedError(model=model) from error

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
