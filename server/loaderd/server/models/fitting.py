"""Whether and where a load fits: which devices, and how many bytes of each.

Pure, like the book of devices that it reads. Which layers go to which device is decided by
accelerate when the model loads; it is given for each device the room for weights that a placement
has, so what it does is within what was reserved.

accelerate fills one device after the other with whole layers, and keeps as much free on the first
one, and in main memory, as the largest layer takes. So each device may leave room unused for which
the next layer is too large, and a placement has that much more there: the `slack`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loaderd.server.models.placement import DeviceBook, Needs, Placement
from loaderd.server.models.where import AUTO, BALANCED, CPU, DISK, SEQUENTIAL, Where

Rooms = Mapping[str, int]
"""Bytes that could be had, by device."""

_NEWCOMER = ""
"""Holds, in a copy of a book, what is being placed."""
_KV_SHARE = 0.5
"""What a worker takes for keys and values of what its weights leave free of an accelerator."""


@dataclass(frozen=True)
class _Fit:
    """What a load would take: see `Placement`."""

    devices: Mapping[str, int]
    weight_room: Mapping[str, int] = field(default_factory=dict)
    offloaded: Mapping[str, int] = field(default_factory=dict)
    copies: bool = False


def place_all(
    book: DeviceBook, needs: Needs, where: Where, count: int, holder: str = ""
) -> list[Placement]:
    """Places replicas of a model beside each other; reserves nothing.

    Under "auto" each goes to an accelerator without one of this model, where it fits there. One
    that shares an accelerator with earlier ones has what their keys and values leave.

    Args:
        book: What is free.
        needs: What each takes.
        where: Where they may go.
        count: How many, at least 1.
        holder: The model's id, if some of its replicas are there.

    Returns:
        Where each goes; the last one does not fit, or there are `count`.

    Raises:
        UnsupportedOptionError: The box has no such device.
    """
    rest = book if count == 1 else copy.deepcopy(book)
    taken = book.devices_of(holder)
    placements: list[Placement] = []
    while True:
        placement = place(rest, needs, where, rather_not=taken)
        others = tuple(each for each in placement.holders if each.id != _NEWCOMER)
        placements.append(replace(placement, holders=others))
        if not placement.fits or len(placements) == count:
            break
        rest.reserve(_NEWCOMER, "", _filled(rest, placement, where), share=len(placements))
        taken |= placement.devices.keys()
    return placements


def together(placements: Sequence[Placement], count: int) -> Placement:
    """What replicas take that were placed one after the other.

    Args:
        placements: Of `place_all`.
        count: How many were to be placed.
    """
    if count == 1:
        return placements[0]
    *earlier, last = placements
    held = sum(each.needed_bytes for each in earlier)
    return replace(
        last,
        needed_bytes=held + (count - len(earlier)) * last.needed_bytes,
        free_bytes=held + last.free_bytes,
        devices=_sums(each.devices for each in placements) if last.fits else {},
        weight_room={},
        offloaded=_sums(each.offloaded for each in placements) if last.fits else {},
    )


def _sums(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for part in parts:
        for device, count in part.items():
            sums[device] = sums.get(device, 0) + count
    return sums


def _filled(book: DeviceBook, placement: Placement, where: Where) -> Mapping[str, int]:
    """What a placement will hold when its keys and values have the room that they take."""
    filled = {}
    for device, count in placement.devices.items():
        spare = max(_room(book, where, device) - count, 0)
        filled[device] = count + int(_KV_SHARE * spare) * (device != CPU)
    return filled if book.has(filled) else placement.devices


def place(
    book: DeviceBook, needs: Needs, where: Where, rather_not: Collection[str] = ()
) -> Placement:
    """Says whether and where a model fits; reserves nothing.

    Nothing goes to the CPU beside accelerators, or to the disk, unless it is asked for or allowed.

    Args:
        book: What is free.
        needs: What the model takes.
        where: Where it may go.
        rather_not: Accelerators that "auto" takes only where it does not fit on another one.

    Raises:
        UnsupportedOptionError: The box has no such device.
    """
    ids = [device.id for device in book.devices]
    where.check(ids)
    rooms = {device: _room(book, where, device) for device in ids}
    if where.module_map:
        return _answer(book, where, rooms, _as_mapped(needs, where, rooms), _mapped_devices(where))
    choices = _choices(where, rooms, rather_not)
    for devices in choices:
        fit = _fit(needs, {device: rooms[device] for device in devices}, where.device_map)
        if _is_within(fit, rooms):
            return _answer(book, where, rooms, fit, devices)
    widest = choices[-1]
    if not where.offload:
        return _answer(book, where, rooms, fit, widest)
    rooms_beside = {device: rooms[device] for device in widest}
    main = _main_memory(book, where, rooms_beside)
    fit = _offloading(needs, rooms_beside, main, to_disk=where.may_use_disk) or fit
    if main is None:
        return _answer(book, where, rooms, fit, widest)
    return _answer(book, where, {**rooms, CPU: main}, fit, [*widest, CPU])


def _room(book: DeviceBook, where: Where, device: str) -> int:
    available = book.available(device)
    return min(available, where.bounds.get(device, available))


def _choices(where: Where, rooms: Rooms, rather_not: Collection[str]) -> list[list[str]]:
    """Sets of devices to try, in this order; never empty."""
    accelerators = [device for device in rooms if device != CPU]
    if where.device is not None:
        return [[where.device]]
    if not accelerators:
        return [[CPU]]
    if where.device_map == SEQUENTIAL:
        return [accelerators[:count] for count in range(1, len(accelerators) + 1)]
    choices = [accelerators]
    if where.device_map == AUTO and len(accelerators) > 1:
        by_room = sorted(accelerators, key=lambda device: -rooms[device])
        without = [device for device in by_room if device not in rather_not]
        choices[:0] = [[device] for device in (*without[:1], by_room[0])]
    return choices


def _fit(needs: Needs, rooms: Rooms, device_map: str) -> _Fit:
    """On these devices, none of which is the CPU if there are several; it may not fit."""
    if len(rooms) > 1:
        # A device without room for two layers is left out: it could be given nothing.
        usable = {
            device: room for device, room in rooms.items() if room > needs.each + 2 * needs.largest
        }
        if len(usable) > 1:
            return _spread(needs, usable, _STRATEGIES[device_map])
        rooms = usable or rooms
    device, room = max(rooms.items(), key=lambda each: each[1])
    total = needs.divisible + needs.each
    with_copies = 0 < needs.copies <= room - total
    return _Fit({device: total + needs.copies if with_copies else total}, copies=with_copies)


def _spread(needs: Needs, rooms: Rooms, strategy: Callable[[int, Rooms], dict[str, int]]) -> _Fit:
    """Over several devices; keys and values go with their layers."""
    slack = _slack(list(rooms), needs.largest)
    besides = {device: needs.each + slack[device] for device in rooms}
    spare = {device: max(room - besides[device], 0) for device, room in rooms.items()}
    shares = strategy(needs.divisible, spare)
    return _Fit(
        devices={device: besides[device] + share for device, share in shares.items()},
        weight_room={
            device: slack[device] + _part(share, needs.weights, needs.divisible)
            for device, share in shares.items()
        },
    )


def _offloading(needs: Needs, rooms: Rooms, main: int | None, *, to_disk: bool) -> _Fit | None:
    """With all devices full, then main memory, then the disk; None where there is no room.

    Args:
        needs: What the model takes. Layers that are offloaded have their keys and values where
            they are computed.
        rooms: Of the devices that compute.
        main: Of main memory beside them; None where that computes, or is none beside them.
        to_disk: Whether the disk may hold what is left.
    """
    besides = needs.each + needs.kv_cache
    usable = {device: room for device, room in rooms.items() if room > besides + 2 * needs.largest}
    if not usable:
        return None
    slack = _slack(list(usable), needs.largest)
    weights = needs.weights + needs.margin
    spare = {device: room - besides - slack[device] for device, room in usable.items()}
    shares = _in_order(min(weights, sum(spare.values())), spare)
    left = weights - sum(shares.values())
    devices = {device: besides + slack[device] + share for device, share in shares.items()}
    holds = {device: slack[device] + share for device, share in shares.items()}
    offloaded: dict[str, int] = {}
    besides_main = needs.headroom + 2 * needs.largest
    if main is not None and (share := min(left, main - besides_main)) > 0:
        devices[CPU] = besides_main + share
        holds[CPU] = 2 * needs.largest + share
        offloaded[CPU] = _part(share, needs.weights, weights)
        left -= share
    if left and not to_disk:
        return None
    if left:
        offloaded[DISK] = _part(left, needs.weights, weights)
    return _Fit(devices, holds, offloaded)


def _as_mapped(needs: Needs, where: Where, rooms: Rooms) -> _Fit:
    """As a module map says; what is offloaded is computed on the first accelerator."""
    devices = _mapped_devices(where)
    computing = [device for device in devices if device != CPU] or [CPU]
    offloaded = {
        device: needs.placed.get(device, 0)
        for device in {*where.modules.values()} & {CPU, DISK}
        if device not in computing
    }
    first = min(computing, key=list(rooms).index)
    taken = {}
    for device in {*devices, first}:
        weights = needs.placed.get(device, 0)
        taken[device] = weights + _part(weights, needs.margin, needs.weights) + needs.headroom
        if device in computing:
            taken[device] += needs.activations + _part(weights, needs.kv_cache, needs.weights)
    if offloaded:
        taken[first] += needs.largest
        count = sum(offloaded.values())
        taken[first] += _part(count, needs.kv_cache, needs.weights)
    return _Fit(taken, offloaded=offloaded)


def _mapped_devices(where: Where) -> list[str]:
    """Devices of a module map whose memory it takes; the CPU where all is on the disk."""
    return sorted({*where.modules.values()} - {DISK}) or [CPU]


def _main_memory(book: DeviceBook, where: Where, beside: Rooms) -> int | None:
    """Room in main memory for what accelerators do not hold; None where there are none."""
    if CPU in beside:
        return None
    pools = {device.id: device.pool for device in book.devices}
    # What is unified is not there twice.
    shared = sum(room for device, room in beside.items() if pools[device] == pools[CPU])
    return max(_room(book, where, CPU) - shared, 0)


def _answer(
    book: DeviceBook, where: Where, rooms: Rooms, fit: _Fit, devices: Sequence[str]
) -> Placement:
    fits = _is_within(fit, rooms) and book.has(fit.devices)
    return Placement(
        fits=fits,
        needed_bytes=sum(fit.devices.values()),
        free_bytes=sum(rooms[device] for device in devices),
        devices=dict(fit.devices) if fits else {},
        holders=tuple(holder for device in devices for holder in book.holders(device)),
        copies=fit.copies and fits,
        computing=sum(device != CPU for device in fit.devices) or 1,
        weight_room=dict(fit.weight_room) if fits else {},
        offloaded=dict(fit.offloaded) if fits else {},
        bounded=tuple(
            device
            for device in devices
            if device in where.bounds and where.bounds[device] < book.available(device)
        ),
    )


def _is_within(fit: _Fit, rooms: Rooms) -> bool:
    return all(count <= rooms[device] for device, count in fit.devices.items())


def _slack(devices: Sequence[str], largest: int) -> dict[str, int]:
    return {device: largest * (1 if index else 2) for index, device in enumerate(devices)}


def _part(share: int, part: int, whole: int) -> int:
    """Of a share of the whole, how much belongs to a part of the whole; rounded up."""
    return -(-share * part // whole) if whole else 0


def _by_room(total: int, spare: Rooms) -> dict[str, int]:
    room = sum(spare.values())
    shares = {device: total * each // room if room else 0 for device, each in spare.items()}
    return _with_rest(total, shares, spare)


def _evenly(total: int, spare: Rooms) -> dict[str, int]:
    shares: dict[str, int] = {}
    left = total
    for count, device in enumerate(sorted(spare, key=lambda device: spare[device])):
        shares[device] = min(spare[device], left // (len(spare) - count))
        left -= shares[device]
    return _with_rest(total, {device: shares[device] for device in spare}, spare)


def _in_order(total: int, spare: Rooms) -> dict[str, int]:
    return _with_rest(total, dict.fromkeys(spare, 0), spare)


def _with_rest(total: int, shares: dict[str, int], spare: Rooms) -> dict[str, int]:
    """What is missing goes to the first ones with room; what has none, to the last one."""
    missing = total - sum(shares.values())
    for device, room in spare.items():
        more = max(min(missing, room - shares[device]), 0)
        shares[device] += more
        missing -= more
    shares[list(spare)[-1]] += missing
    return shares


_STRATEGIES = {AUTO: _by_room, BALANCED: _evenly, SEQUENTIAL: _in_order}
"""How what is divisible is divided, by device map."""
