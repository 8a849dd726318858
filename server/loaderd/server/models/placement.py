"""Which memory is whose: devices, what loads need of them, and who has reserved what.

Pure: what is measured comes in as numbers, so that a simulated box can be driven through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from loaderd.server.errors import DeviceMemoryError
from loaderd.server.models.where import CPU


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A device and its memory.

    Attributes:
        id: Its name in a device map, such as "cuda:0" or "cpu".
        total_bytes: Its memory.
        free_bytes: What of it was free when it was measured.
        measured_at: Monotonic time of that; it may be long ago.
        shares: The device whose memory this one uses too; its own id where memory is not unified.
    """

    id: str
    total_bytes: int
    free_bytes: int
    measured_at: float
    shares: str = ""

    @property
    def pool(self) -> str:
        """Whose memory it is; devices of one pool take from the same bytes."""
        return self.shares or self.id

    @property
    def is_accelerator(self) -> bool:
        """Whether it is another device than the CPU."""
        return self.id != CPU


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model takes, in bytes.

    Attributes:
        weights: The weights in the dtype that they will have.
        kv_cache: The least that keys and values need to be of use.
        activations: What a step computes with, on each device.
        headroom: What a process needs besides on each device: its context.
        copies: Copies of weights in a form that a CPU multiplies faster. They are made where
            there is room, so a model fits without them.
        margin: What allocators leave unused beside the weights.
        largest: The largest part of the weights that is not divided between devices.
        placed: The weights of each device, where a module map says which are whose.
    """

    weights: int
    kv_cache: int
    activations: int
    headroom: int
    copies: int = 0
    margin: int = 0
    largest: int = 0
    placed: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def divisible(self) -> int:
        """What is spread where there are several devices."""
        return self.weights + self.kv_cache + self.margin

    @property
    def each(self) -> int:
        """What each device that computes takes besides."""
        return self.activations + self.headroom


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has memory reserved.

    Attributes:
        id: The model's id.
        name: Its name.
        bytes: How many of one device's bytes.
    """

    id: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """An answer to whether a model fits.

    Attributes:
        fits: Whether it does.
        needed_bytes: What it takes of all its devices.
        free_bytes: What could be had of the devices that it may be on, within the load's bounds.
        devices: Bytes on each device, if it fits: what is to be reserved.
        holders: Who has memory of the devices that it may be on.
        copies: Whether there is room for copies of the weights.
        computing: How many of the devices compute.
        weight_room: Of the reserved bytes of each device, those for weights, where layers are
            spread; empty where all are on one device, or a module map says where they are.
        offloaded: The most weights that are in main memory beside accelerators, or on the disk.
        bounded: Of those devices, the ones of which the load's bounds allow less than could be had.
    """

    fits: bool
    needed_bytes: int
    free_bytes: int
    devices: Mapping[str, int]
    holders: tuple[Holder, ...]
    copies: bool = False
    computing: int = 1
    weight_room: Mapping[str, int] = field(default_factory=dict)
    offloaded: Mapping[str, int] = field(default_factory=dict)
    bounded: tuple[str, ...] = ()

    def check(self, model: str) -> None:
        """Refuses what does not fit.

        Raises:
            DeviceMemoryError: It does not.
        """
        if not self.fits:
            raise self.refusal(model)

    def refusal(
        self, model: str, needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> DeviceMemoryError:
        """That a model does not fit, with what a worker has found out of it, if it has."""
        return DeviceMemoryError(
            model,
            self.needed_bytes if needed_bytes is None else needed_bytes,
            self.free_bytes if free_bytes is None else free_bytes,
            told(self.holders),
            ", ".join(self.bounded) or None,
        )


@dataclass(frozen=True, slots=True)
class _Reservation:
    """One replica's bytes by device; what of it is really taken, since when.

    Attributes:
        name: The model's name.
        bytes: Reserved on each device.
        begun: By memory, when it was last measured before this load began.
        taken: Of that, really taken on each device.
        taken_since: Monotonic time from which on `taken` is; infinity while nobody has said.
    """

    name: str
    bytes: Mapping[str, int]
    begun: Mapping[str, float]
    taken: Mapping[str, int] = field(default_factory=dict)
    taken_since: float = math.inf


@dataclass(frozen=True, slots=True)
class _Stay:
    """How long one model had some memory, in monotonic times.

    Attributes:
        begun: Its load began after that.
        taken_since: From then on it had `bytes`; infinity if it never was known what it had.
        left: Until then.
        bytes: How many it had.
    """

    begun: float
    taken_since: float
    left: float
    bytes: int

    def returns(self, measured_at: float) -> int:
        """What of its bytes is free now, and was not when the memory was measured."""
        return self.bytes if self.taken_since <= measured_at < self.left else 0

    def was_loading(self, measured_at: float) -> bool:
        """Whether it had nobody knows how much when the memory was measured."""
        return self.begun < measured_at < min(self.taken_since, self.left)


class DeviceBook:
    """The devices of a box and who has reserved what of them.

    Two loads at once never count the same bytes: what is reserved and not taken yet is free only
    for whom it was reserved. A device measured before a model took its bytes, or before a model
    left, still shows the memory as it was; the book corrects that until it is measured again. What
    is measured while a load takes its bytes tells nothing, and is not taken over.

    Each replica of a model has a share of its own, whose number only tells it from the others.
    """

    def __init__(self) -> None:
        self._devices: dict[str, MemoryDevice] = {}
        self._reservations: dict[tuple[str, int], _Reservation] = {}
        self._left: dict[str, list[_Stay]] = {}

    @property
    def devices(self) -> tuple[MemoryDevice, ...]:
        """All devices, accelerators first."""
        return tuple(self._devices.values())

    def measure(self, devices: Iterable[MemoryDevice]) -> None:
        """Takes over what was measured: all devices of the box, accelerators first."""
        self._devices = {
            device.id: self._devices[device.id]
            if device.id in self._devices and self._was_loading(device)
            else device
            for device in devices
        }
        for pool, stays in self._left.items():
            later = [stay for stay in stays if stay.left > self._measured_at(pool)]
            self._left[pool] = later

    def reserve(self, holder: str, name: str, bytes_of: Mapping[str, int], share: int = 0) -> None:
        """Reserves bytes by device for a load, which has taken none of them yet.

        Args:
            holder: The model's id.
            name: Its name.
            bytes_of: Bytes by device, of a placement that fits.
            share: Which replica's.

        Raises:
            DeviceMemoryError: They are not there any more.
        """
        for pool, wanted in self._by_pool(bytes_of).items():
            available = self._available(pool)
            if wanted > available:
                holders = self.holders(pool)
                raise DeviceMemoryError(name, wanted, available, told(holders))
        begun = {pool: self._measured_at(pool) for pool in self._by_pool(bytes_of)}
        self._reservations[holder, share] = _Reservation(name, dict(bytes_of), begun)

    def note(self, holder: str, taken: Mapping[str, int], now: float, share: int = 0) -> None:
        """Notes what a load has taken of its reservation by now.

        Args:
            holder: The model's id; nothing happens when it has no reservation.
            taken: Bytes by device.
            now: Monotonic time.
            share: Which replica's.
        """
        key = holder, share
        if key in self._reservations:
            reservation = self._reservations[key]
            self._reservations[key] = replace(reservation, taken=dict(taken), taken_since=now)

    def settle(
        self,
        holder: str,
        taken: Mapping[str, int],
        more: Mapping[str, int],
        now: float,
        share: int = 0,
    ) -> None:
        """Turns a load's reservation into what the loaded model really holds.

        Args:
            holder: The model's id; nothing happens when it has no reservation.
            taken: Bytes by device that it has taken.
            more: Bytes by device that it may take yet.
            now: Monotonic time.
            share: Which replica's.
        """
        key = holder, share
        if key in self._reservations:
            held = {
                device: taken.get(device, 0) + more.get(device, 0) for device in {*taken, *more}
            }
            self._reservations[key] = replace(self._reservations[key], bytes=held)
            self.note(holder, taken, now, share)

    def hand_over(self, holder: str, heir: str, share: int = 0) -> None:
        """What a holder has is another one's from now on; nothing happens when it has nothing."""
        if (holder, share) in self._reservations:
            self._reservations[heir, share] = self._reservations.pop((holder, share))

    def release(self, holder: str, now: float, share: int | None = None) -> None:
        """Gives back what a model had; nothing happens when it had nothing.

        Args:
            holder: The model's id.
            now: Monotonic time.
            share: Which replica's; None for all.
        """
        for key in list(self._reservations):
            if key[0] != holder or share not in {None, key[1]}:
                continue
            reservation = self._reservations.pop(key)
            taken = self._by_pool(reservation.taken)
            for pool, begun in reservation.begun.items():
                stay = _Stay(begun, reservation.taken_since, now, taken.get(pool, 0))
                self._left.setdefault(pool, []).append(stay)

    def available(self, device: str) -> int:
        """Bytes of a device that nobody has and nobody has reserved."""
        found = self._devices.get(device)
        if found is None:
            return 0
        return min(self._available(found.pool), found.total_bytes)

    def has(self, bytes_of: Mapping[str, int]) -> bool:
        """Whether so many bytes by device could be had together."""
        pools = self._by_pool(bytes_of)
        return all(wanted <= self._available(pool) for pool, wanted in pools.items())

    def taken(self, device: str) -> int:
        """Bytes of a device that loads have really taken of what is reserved."""
        found = self._devices.get(device)
        pool = device if found is None else found.pool
        return sum(self._by_pool(each.taken).get(pool, 0) for each in self._reservations.values())

    def holders(self, device: str) -> tuple[Holder, ...]:
        """Who has reserved or taken bytes of a device's memory, the most first."""
        found = self._devices.get(device)
        pool = device if found is None else found.pool
        held: dict[tuple[str, str], int] = {}
        for (holder, _), each in self._reservations.items():
            if count := self._by_pool(each.bytes).get(pool, 0):
                held[holder, each.name] = held.get((holder, each.name), 0) + count
        holders = [Holder(holder, name, count) for (holder, name), count in held.items()]
        return tuple(sorted(holders, key=lambda holder: (-holder.bytes, holder.id)))

    def devices_of(self, holder: str) -> set[str]:
        """Devices of which a model has some."""
        return {
            device
            for (other, _), each in self._reservations.items()
            if other == holder
            for device in each.bytes
        }

    def _available(self, pool: str) -> int:
        """Bytes of a pool that nobody has: what is less, by its size or by what was measured."""
        device = self._devices.get(pool)
        if device is None:
            return 0
        reserved, unbacked = 0, 0
        for each in self._reservations.values():
            count = self._by_pool(each.bytes).get(pool, 0)
            taken = self._by_pool(each.taken).get(pool, 0)
            reserved += max(count, taken)
            unbacked += count if each.taken_since > device.measured_at else max(count - taken, 0)
        left = self._left.get(pool, [])
        free = device.free_bytes + sum(stay.returns(device.measured_at) for stay in left)
        return max(min(device.total_bytes - reserved, free - unbacked), 0)

    def _was_loading(self, device: MemoryDevice) -> bool:
        """Whether a model was taking bytes when a device was measured."""
        pool, measured_at = device.pool, device.measured_at
        there = [
            _Stay(each.begun[pool], each.taken_since, math.inf, 0)
            for each in self._reservations.values()
            if pool in each.begun
        ]
        return any(stay.was_loading(measured_at) for stay in (*there, *self._left.get(pool, [])))

    def _by_pool(self, bytes_of: Mapping[str, int]) -> dict[str, int]:
        pools: dict[str, int] = {}
        for device, count in bytes_of.items():
            pool = self._devices[device].pool if device in self._devices else device
            pools[pool] = pools.get(pool, 0) + count
        return pools

    def _measured_at(self, pool: str) -> float:
        device = self._devices.get(pool)
        return 0.0 if device is None else device.measured_at


def told(holders: Iterable[Holder]) -> str | None:
    """Holders for people, such as "org/a (2.1 GB), org/b (0.3 GB)"; None if there are none."""
    return ", ".join(f"{each.name} ({each.bytes / 1e9:.1f} GB)" for each in holders) or None
