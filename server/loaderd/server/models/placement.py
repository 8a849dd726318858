"""Which memory is whose: devices, what loads need of them, and who has reserved what.

Pure: what is measured comes in as numbers, so that a simulated box can be driven through it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loaderd.server.errors import DeviceMemoryError, UnsupportedOptionError

AUTO = "auto"
CPU = "cpu"
_NEWCOMER = ""
"""Holds, in a copy of a book, what is being placed."""
_KV_SHARE = 0.5
"""What a worker takes for keys and values of what its weights leave free of an accelerator."""


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
    """What a model takes on one device, in bytes.

    Attributes:
        weights: The weights in the dtype that they will have.
        kv_cache: The least that keys and values need to be of use.
        activations: What a step computes with.
        headroom: What a process needs besides on each device: its context, fragments, margins.
        copies: Copies of weights in a form that a CPU multiplies faster. They are made where
            there is room, so a model fits without them.
    """

    weights: int
    kv_cache: int
    activations: int
    headroom: int
    copies: int = 0

    def on(self, count: int) -> int:
        """Bytes on so many devices together, without copies."""
        return self.weights + self.kv_cache + count * (self.activations + self.headroom)


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
        free_bytes: What could be had of the devices that it may be on.
        devices: Bytes on each device, if it fits: what is to be reserved.
        holders: Who has memory of the devices that it may be on.
        copies: Whether there is room for copies of the weights.
    """

    fits: bool
    needed_bytes: int
    free_bytes: int
    devices: Mapping[str, int]
    holders: tuple[Holder, ...]
    copies: bool = False

    def check(self, model: str) -> None:
        """Refuses what does not fit.

        Raises:
            DeviceMemoryError: It does not.
        """
        if not self.fits:
            raise DeviceMemoryError(model, self.needed_bytes, self.free_bytes, told(self.holders))

    @classmethod
    def together(cls, placements: Sequence[Placement], count: int) -> Placement:
        """What replicas take that were placed one after the other.

        Args:
            placements: Of `DeviceBook.place_all`: all that fit, or those up to the first misfit.
            count: How many were to be placed.
        """
        *earlier, last = placements
        held = sum(each.needed_bytes for each in earlier)
        devices: dict[str, int] = {}
        for each in placements:
            for device, share in each.devices.items():
                devices[device] = devices.get(device, 0) + share
        return cls(
            fits=last.fits,
            needed_bytes=held + (count - len(earlier)) * last.needed_bytes,
            free_bytes=held + last.free_bytes,
            devices=devices if last.fits else {},
            holders=last.holders,
            copies=all(each.copies for each in placements),
        )


@dataclass(frozen=True, slots=True)
class _Reservation:
    """One replica's bytes by device; what of it is really taken, since when.

    Attributes:
        name: The model's name.
        bytes: Reserved on each device.
        taken: Of that, really taken on each device.
        taken_since: Monotonic time from which on `taken` is.
    """

    name: str
    bytes: Mapping[str, int]
    taken: Mapping[str, int]
    taken_since: float


class DeviceBook:
    """The devices of a box and who has reserved what of them.

    Two loads at once never count the same bytes: what is reserved and not taken yet is free only
    for whom it was reserved. A device measured before a model took its bytes, or before a model
    left, still shows the memory as it was; the book corrects that until it is measured again.

    Each replica of a model has a share of its own, whose number only tells it from the others.
    """

    def __init__(self) -> None:
        self._devices: dict[str, MemoryDevice] = {}
        self._reservations: dict[tuple[str, int], _Reservation] = {}
        self._returned: dict[str, list[tuple[float, int]]] = {}

    @property
    def devices(self) -> tuple[MemoryDevice, ...]:
        """All devices, accelerators first."""
        return tuple(self._devices.values())

    def measure(self, devices: Iterable[MemoryDevice]) -> None:
        """Takes over what was measured: all devices of the box, accelerators first."""
        self._devices = {device.id: device for device in devices}
        for pool, returned in self._returned.items():
            later = [each for each in returned if each[0] > self._measured_at(pool)]
            self._returned[pool] = later

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
        self._reservations[holder, share] = _Reservation(name, dict(bytes_of), {}, 0.0)

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
            for pool, count in self._by_pool(reservation.taken).items():
                if reservation.taken_since <= self._measured_at(pool):
                    self._returned.setdefault(pool, []).append((now, count))

    def available(self, device: str) -> int:
        """Bytes of a device that nobody has and nobody has reserved."""
        found = self._devices.get(device)
        if found is None:
            return 0
        return min(self._available(found.pool), found.total_bytes)

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

    def place_all(
        self, needs: Needs, device_map: str, count: int, holder: str = ""
    ) -> list[Placement]:
        """Places replicas of a model beside each other; reserves nothing.

        Under "auto" each goes to an accelerator without one of this model, where it fits there.
        One that shares an accelerator with earlier ones has what their keys and values leave.

        Args:
            needs: Of each.
            device_map: Where.
            count: How many, at least 1.
            holder: The model's id, if some of its replicas are there.

        Returns:
            Where each goes; the last one does not fit, or there are `count`.

        Raises:
            UnsupportedOptionError: The box has no such device.
        """
        rest = copy.deepcopy(self)
        taken = rest.devices_of(holder)
        placements: list[Placement] = []
        while len(placements) < count:
            placement = rest.place(needs, device_map, taken)
            others = tuple(each for each in placement.holders if each.id != _NEWCOMER)
            placements.append(replace(placement, holders=others))
            if not placement.fits:
                break
            rest.reserve(_NEWCOMER, "", rest._filled(placement), share=len(placements))
            taken |= placement.devices.keys()
        return placements

    def _filled(self, placement: Placement) -> dict[str, int]:
        """What a placement will hold when its keys and values have the room that they take."""
        return {
            device: count + int(_KV_SHARE * (self.available(device) - count)) * (device != CPU)
            for device, count in placement.devices.items()
        }

    def place(self, needs: Needs, device_map: str, rather_not: Collection[str] = ()) -> Placement:
        """Says whether and where a model fits; reserves nothing.

        "auto" takes the one accelerator with the most room, else all of them together, and the CPU
        on a box without accelerators: nothing goes to the CPU beside accelerators unasked.

        Args:
            needs: What is to fit.
            device_map: Where.
            rather_not: Accelerators that "auto" takes only where it does not fit on another one.

        Raises:
            UnsupportedOptionError: The box has no such device.
        """
        for devices in self._choices(device_map, rather_not):
            placement = self._place_on(devices, needs)
            if placement.fits:
                break
        return placement

    def _choices(self, device_map: str, rather_not: Collection[str]) -> list[list[MemoryDevice]]:
        """Sets of devices to try, in this order; never empty."""
        if device_map != AUTO:
            wanted = device_map if ":" in device_map or device_map == CPU else f"{device_map}:0"
            if wanted not in self._devices:
                raise UnsupportedOptionError(
                    "options.device_map", f"this box has no device {device_map!r}"
                )
            return [[self._devices[wanted]]]
        accelerators = [each for each in self._devices.values() if each.is_accelerator]
        if not accelerators:
            return [list(self._devices.values())]
        by_room = sorted(accelerators, key=lambda device: -self.available(device.id))
        free_of_it = [device for device in by_room if device.id not in rather_not]
        choices = [[device] for device in (*free_of_it[:1], by_room[0])]
        if len(accelerators) > 1:
            choices.append(accelerators)
        return choices

    def _place_on(self, devices: list[MemoryDevice], needs: Needs) -> Placement:
        rooms = {device.id: self.available(device.id) for device in devices}
        free, needed = sum(rooms.values()), needs.on(len(devices))
        each = needs.activations + needs.headroom
        fits = needed <= free and all(room >= each for room in rooms.values())
        with_copies = fits and len(devices) == 1 and 0 < needs.copies <= free - needed
        total = needed + needs.copies if with_copies else needed
        return Placement(
            fits=fits,
            needed_bytes=total,
            free_bytes=free,
            devices=_spread(total, each, rooms) if fits else {},
            holders=tuple(holder for device in devices for holder in self.holders(device.id)),
            copies=with_copies,
        )

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
        free = device.free_bytes + sum(count for _, count in self._returned.get(pool, []))
        return max(min(device.total_bytes - reserved, free - unbacked), 0)

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


def _spread(total: int, each: int, rooms: Mapping[str, int]) -> dict[str, int]:
    """Divides bytes over devices by their room, with `each` on every one of them."""
    left = total - each * len(rooms)
    spare = sum(rooms.values()) - each * len(rooms)
    shares = {
        device: each + (left * (room - each) // spare if spare else 0)
        for device, room in rooms.items()
    }
    missing = total - sum(shares.values())
    for device, room in rooms.items():
        more = min(missing, room - shares[device])
        shares[device] += more
        missing -= more
    return shares
