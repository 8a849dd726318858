"""The book of devices: who may take which bytes, whatever comes in whatever order."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import DeviceMemoryError
from loaderd.server.models.fitting import place, place_all, together
from loaderd.server.models.placement import DeviceBook, MemoryDevice, Needs
from loaderd.server.models.where import Where

GB = 10**9
GPUS = [MemoryDevice(f"cuda:{index}", 80 * GB, 80 * GB, 0.0) for index in range(8)]
BIG_CPU = MemoryDevice("cpu", 64 * GB, 60 * GB, 0.0)


def book(*devices: MemoryDevice) -> DeviceBook:
    made = DeviceBook()
    made.measure(devices)
    return made


def needs(weights: int, copies: int = 0) -> Needs:
    return Needs(weights=weights, kv_cache=GB, activations=GB, headroom=GB, copies=copies)


def test_a_load_takes_one_accelerator_and_says_what_is_left() -> None:
    box = book(*GPUS, BIG_CPU)
    placement = place(box, needs(60 * GB), Where("auto"))
    assert placement.devices == {"cuda:0": 63 * GB}
    box.reserve("m:1", "org/a", placement.devices)
    assert box.available("cuda:0") == 17 * GB
    assert place(box, needs(60 * GB), Where("auto")).devices == {"cuda:1": 63 * GB}
    assert [holder.name for holder in box.holders("cuda:0")] == ["org/a"]


def test_unified_memory_is_counted_once() -> None:
    box = book(replace(BIG_CPU, id="mps:0", total_bytes=48 * GB, shares="cpu"), BIG_CPU)
    box.reserve("m:1", "org/a", {"mps:0": 40 * GB})
    assert box.available("cpu") == box.available("mps:0") == 20 * GB
    assert not place(box, needs(30 * GB), Where("cpu")).fits


def test_what_other_programs_hold_is_not_to_be_had() -> None:
    box = book(replace(BIG_CPU, free_bytes=5 * GB))
    assert not place(box, needs(10 * GB), Where("auto")).fits
    with pytest.raises(DeviceMemoryError):
        box.reserve("m:1", "org/a", {"cpu": 6 * GB})


def test_a_stale_measurement_is_corrected_by_who_came_and_left() -> None:
    box = book(GPUS[0], BIG_CPU)
    box.reserve("m:1", "org/a", {"cuda:0": 50 * GB})
    box.settle("m:1", {"cuda:0": 40 * GB}, {"cuda:0": 2 * GB}, now=10.0)
    assert box.available("cuda:0") == 38 * GB  # measured before it came
    box.measure([replace(GPUS[0], free_bytes=39 * GB, measured_at=20.0), BIG_CPU])
    assert box.available("cuda:0") == 37 * GB  # another program took one
    box.release("m:1", now=30.0)
    assert box.available("cuda:0") == 79 * GB  # measured before it left
    box.measure([replace(GPUS[0], free_bytes=78 * GB, measured_at=40.0), BIG_CPU])
    assert box.available("cuda:0") == 78 * GB


def test_what_was_measured_before_a_model_left_does_not_count_as_taken_by_others() -> None:
    box = book(GPUS[0], BIG_CPU)
    box.reserve("m:1", "org/a", {"cuda:0": 50 * GB})
    box.settle("m:1", {"cuda:0": 40 * GB}, {}, now=10.0)
    box.release("m:1", now=30.0)
    box.measure([replace(GPUS[0], free_bytes=40 * GB, measured_at=20.0), BIG_CPU])
    assert box.available("cuda:0") == 80 * GB


@pytest.mark.parametrize("is_seen_midway", [True, False])
def test_what_was_measured_while_a_load_took_its_bytes_is_not_taken_over(
    is_seen_midway: bool,
) -> None:
    box = book(GPUS[0], BIG_CPU)
    midway = [replace(GPUS[0], free_bytes=60 * GB, measured_at=20.0), BIG_CPU]
    box.reserve("m:1", "org/a", {"cuda:0": 50 * GB})
    if is_seen_midway:
        box.measure(midway)
    assert box.available("cuda:0") == 30 * GB
    box.settle("m:1", {"cuda:0": 40 * GB}, {}, now=30.0)
    box.measure(midway)
    assert box.available("cuda:0") == 40 * GB
    box.release("m:1", now=40.0)
    box.measure(midway)
    assert box.available("cuda:0") == 80 * GB
    box.measure([replace(GPUS[0], free_bytes=79 * GB, measured_at=50.0), BIG_CPU])
    assert box.available("cuda:0") == 79 * GB


def test_a_load_that_failed_midway_leaves_nothing_taken() -> None:
    box = book(GPUS[0], BIG_CPU)
    box.reserve("m:1", "org/a", {"cuda:0": 50 * GB})
    box.release("m:1", now=30.0)
    box.measure([replace(GPUS[0], free_bytes=60 * GB, measured_at=20.0), BIG_CPU])
    assert box.available("cuda:0") == 80 * GB


@dataclass
class Simulated:
    """A box whose models really take memory, and whose free memory is measured at times."""

    total: int
    taken: dict[str, int]
    other: int = 0
    now: float = 0.0

    def measured(self) -> MemoryDevice:
        self.now += 1
        free = self.total - self.other - sum(self.taken.values())
        return MemoryDevice("cpu", self.total, free, self.now)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["load", "take", "ready", "unload", "measure"]),
        st.integers(0, 5),
        st.integers(1, 60),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(0, 30))
def test_the_box_is_never_promised_twice_and_all_comes_back(
    events: list[tuple[str, int, int]], other: int
) -> None:
    box = Simulated(100, {}, other)
    devices = book(box.measured())
    reserved: dict[str, int] = {}
    for event, number, size in events:
        holder = f"m:{number}"
        box.now += 1
        if event == "load" and holder not in reserved:
            try:
                devices.reserve(holder, holder, {"cpu": size})
            except DeviceMemoryError:
                continue
            reserved[holder] = size
        elif event == "take" and holder in reserved:
            # A worker takes what was reserved for it, little by little.
            box.taken[holder] = max(box.taken.get(holder, 0), min(size, reserved[holder]))
            devices.note(holder, {"cpu": box.taken[holder]}, box.now)
        elif event == "ready" and holder in reserved and box.taken.get(holder):
            reserved[holder] = box.taken[holder]
            devices.settle(holder, {"cpu": box.taken[holder]}, {}, box.now)
        elif event == "unload":
            reserved.pop(holder, None)
            box.taken.pop(holder, None)
            devices.release(holder, box.now)
        elif event == "measure":
            devices.measure([box.measured()])
        # Whatever is still to be taken is there, and so is what is offered beyond it.
        promised = sum(reserved.values()) + devices.available("cpu")
        assert promised <= max(box.total - box.other, sum(reserved.values()))
        assert sum(reserved.values()) <= box.total - box.other
    for holder in list(reserved):
        devices.release(holder, box.now)
    box.taken.clear()
    devices.measure([box.measured()])
    assert devices.available("cpu") == box.total - box.other
    assert devices.holders("cpu") == ()


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_the_order_of_those_who_fit_does_not_matter(first: list[int], second: list[int]) -> None:
    books = [book(BIG_CPU), book(BIG_CPU)]
    for devices, order in zip(books, (first, second), strict=True):
        for number in order:
            devices.reserve(f"m:{number}", "org/a", {"cpu": (number + 1) * GB})
    assert books[0].available("cpu") == books[1].available("cpu") == 45 * GB
    assert books[0].holders("cpu") == books[1].holders("cpu")


def test_replicas_go_to_accelerators_of_their_own_while_there_are_some() -> None:
    small = replace(GPUS[1], total_bytes=40 * GB, free_bytes=40 * GB)
    box = book(GPUS[0], small, BIG_CPU)
    places = [list(each.devices) for each in place_all(box, needs(10 * GB), Where(), 3)]
    assert places == [["cuda:0"], ["cuda:1"], ["cuda:0"]]
    box.reserve("m:1", "org/a", {"cuda:0": 13 * GB})
    (more,) = place_all(box, needs(10 * GB), Where(), 1, "m:1")
    assert list(more.devices) == ["cuda:1"]
    (large,) = place_all(box, needs(50 * GB), Where(), 1, "m:1")
    assert list(large.devices) == ["cuda:0"], "it fits on no other"


def test_replicas_that_share_an_accelerator_leave_each_other_room_for_keys_and_values() -> None:
    box = book(replace(GPUS[0], total_bytes=24 * GB, free_bytes=24 * GB), BIG_CPU)
    first, second = place_all(box, needs(7 * GB), Where("cuda:0"), 2)
    assert (first.fits, second.fits) == (True, False), "the first one takes half of the rest"
    both = together([first, second], 2)
    assert not both.fits
    assert both.needed_bytes == 20 * GB > both.free_bytes
    assert [each.fits for each in place_all(box, needs(4 * GB), Where("cuda:0"), 2)] == [True, True]


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=4),
    st.builds(Needs, *[st.integers(0, 80)] * 5),
    st.integers(1, 6),
)
def test_replicas_are_within_what_is_there(free: list[int], wanted: Needs, count: int) -> None:
    box = book(*(MemoryDevice(f"cuda:{i}", 100, room, 0.0) for i, room in enumerate(free)))
    placements = place_all(box, wanted, Where(), count)
    assert all(each.fits for each in placements[:-1])
    assert len(placements) == count if placements[-1].fits else len(placements) <= count
    both = together(placements, count)
    assert both.fits == placements[-1].fits
    for share, each in enumerate(placements):
        if each.fits:
            box.reserve("m:1", "org/a", each.devices, share)
    assert all(box.available(f"cuda:{i}") >= 0 for i in range(len(free)))
    if both.fits:
        held = {d: sum(h.bytes for h in box.holders(d)) for d in both.devices}
        assert held == both.devices
    box.release("m:1", 1.0, share=0)
    left = sum(sum(each.devices.values()) for each in placements[1:])
    assert sum(h.bytes for i in range(len(free)) for h in box.holders(f"cuda:{i}")) == left
    box.release("m:1", 1.0)
    assert not any(box.holders(f"cuda:{i}") for i in range(len(free)))
