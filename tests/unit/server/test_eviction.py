"""Which models go for another one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.models.eviction import to_evict
from loaderd.server.models.fitting import place
from loaderd.server.models.placement import DeviceBook, MemoryDevice, Needs
from loaderd.server.models.where import Where

ROOM = 100
DEVICES = [MemoryDevice(f"cuda:{index}", ROOM, ROOM, 0.0) for index in range(3)]
CPU = MemoryDevice("cpu", 2 * ROOM, 2 * ROOM, 0.0)

loads = st.lists(st.tuples(st.integers(1, 90), st.booleans()), max_size=8)
wanted = st.integers(1, 350)
maps = st.sampled_from(["auto", "cpu", "cuda:1"])


def needs(weights: int) -> Needs:
    return Needs(weights=weights, kv_cache=0, activations=0, headroom=0)


def book_of(sizes: Sequence[tuple[int, bool]]) -> tuple[DeviceBook, list[str]]:
    """A box with those that fit, and the ids of those that may go."""
    book = DeviceBook()
    book.measure([*DEVICES, CPU])
    idle = []
    for number, (size, is_idle) in enumerate(sizes):
        placement = place(book, needs(size), Where())
        if placement.fits:
            book.reserve(f"m:{number}", "x", placement.devices)
            idle += [f"m:{number}"] if is_idle else []
    return book, idle


def fits(book: DeviceBook, going: Sequence[str], size: int, device_map: str) -> bool:
    rest = copy.deepcopy(book)
    for model_id in going:
        rest.release(model_id, 1.0)
    return place(rest, needs(size), Where(device_map)).fits


@given(loads, wanted, maps)
def test_what_goes_makes_room_and_no_one_goes_in_vain(
    sizes: list[tuple[int, bool]], size: int, device_map: str
) -> None:
    book, idle = book_of(sizes)
    before = copy.deepcopy(book)
    going = to_evict(book, needs(size), Where(device_map), idle, 1.0)
    assert set(going) <= set(idle)
    assert book.__dict__ == before.__dict__, "nothing is released by asking"
    if fits(book, [], size, device_map) or not fits(book, idle, size, device_map):
        assert going == []
        return
    assert fits(book, going, size, device_map)
    for model_id in going:
        others = [each for each in going if each != model_id]
        assert not fits(book, others, size, device_map)


def test_of_equals_the_least_recently_used_goes() -> None:
    book, idle = book_of([(80, True), (80, True), (80, True)])
    assert to_evict(book, needs(80), Where("auto"), idle[::-1], 1.0) == [idle[2]]
    assert to_evict(book, needs(80), Where("auto"), [idle[1], idle[0], idle[2]], 1.0) == [idle[1]]


def test_a_model_on_another_device_does_not_go() -> None:
    book, idle = book_of([(80, True), (80, True), (80, True)])
    assert to_evict(book, needs(80), Where("cuda:1"), idle, 1.0) == [idle[1]]


def test_as_many_go_as_all_replicas_need() -> None:
    book, idle = book_of([(80, True), (80, True), (80, True)])
    assert to_evict(book, needs(80), Where(), idle, 1.0, count=2) == idle[:2]
    assert to_evict(book, needs(80), Where(), idle, 1.0, count=4) == []
