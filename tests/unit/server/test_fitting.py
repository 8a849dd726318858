"""Where loads go on made-up boxes: eight accelerators, mixed ones, unified memory, none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import DeviceMemoryError, InvalidArgumentError, UnsupportedOptionError
from loaderd.server.models.fitting import place
from loaderd.server.models.needs import estimate
from loaderd.server.models.placement import DeviceBook, MemoryDevice, Needs, Placement
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.where import Where
from loaderd.server.store.shape import ModelShape
from loaderd.server.store.weights import Tensor
from loaderd.v1.model_pb2 import (
    OFFLOAD_CPU,
    OFFLOAD_DISK,
    OFFLOAD_UNSPECIFIED,
    QUANTIZATION_INT8,
    Offload,
)

GB = 10**9
GPUS = [MemoryDevice(f"cuda:{index}", 80 * GB, 80 * GB, 0.0) for index in range(8)]
BIG_CPU = MemoryDevice("cpu", 64 * GB, 60 * GB, 0.0)
MIXED = [GPUS[0], *(replace(gpu, total_bytes=24 * GB, free_bytes=24 * GB) for gpu in GPUS[1:3])]


def book(*devices: MemoryDevice) -> DeviceBook:
    made = DeviceBook()
    made.measure(devices)
    return made


def needs(weights: int, copies: int = 0, largest: int = 0) -> Needs:
    return Needs(weights, GB, GB, GB, copies, largest=largest)


def planned(
    devices: list[MemoryDevice], weights: int, where: Where, largest: int = GB
) -> Placement:
    placement = place(book(*devices, BIG_CPU), needs(weights, largest=largest), where)
    assert sum(placement.devices.values()) == (placement.needed_bytes if placement.fits else 0)
    return placement


def test_what_no_single_accelerator_holds_is_spread_by_their_room() -> None:
    small = replace(GPUS[1], total_bytes=40 * GB, free_bytes=40 * GB)
    placement = place(book(GPUS[0], small, BIG_CPU), needs(90 * GB), Where())
    assert placement.fits
    assert sum(placement.devices.values()) == placement.needed_bytes == 95 * GB
    assert 1.9 < placement.devices["cuda:0"] / placement.devices["cuda:1"] < 2.1


def test_nothing_goes_to_the_cpu_beside_accelerators_unasked() -> None:
    box = book(GPUS[0], BIG_CPU)
    box.reserve("m:1", "org/a", {"cuda:0": 70 * GB})
    placement = place(box, needs(30 * GB), Where("auto"))
    assert not placement.fits
    with pytest.raises(DeviceMemoryError) as caught:
        placement.check("org/b")
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (33 * GB, 10 * GB)
    assert caught.value.holders == "org/a (70.0 GB)"
    assert place(box, needs(30 * GB), Where("cpu")).devices == {"cpu": 33 * GB}


def test_a_bound_that_is_in_the_way_is_named_and_one_that_is_not_is_not() -> None:
    box = book(GPUS[0], BIG_CPU)
    placement = place(box, needs(30 * GB), Where(max_memory=(("cpu", 1), ("cuda:0", 10 * GB))))
    with pytest.raises(DeviceMemoryError, match=r"10\.00 GB are free by your max_memory of cuda:0"):
        placement.check("org/b")
    wide = place(box, needs(300 * GB), Where(max_memory=(("cuda:0", 500 * GB),)))
    with pytest.raises(DeviceMemoryError) as caught:
        wide.check("org/b")
    assert caught.value.bounded is None


def test_copies_are_counted_where_there_is_room_for_them() -> None:
    box = book(BIG_CPU)
    assert place(box, needs(20 * GB, copies=20 * GB), Where("auto")).devices == {"cpu": 43 * GB}
    assert place(box, needs(30 * GB, copies=30 * GB), Where("auto")).devices == {"cpu": 33 * GB}


def test_a_device_that_the_box_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="cuda:1"):
        place(book(GPUS[0], BIG_CPU), needs(GB), Where("cuda:1"))


def test_eight_accelerators_share_a_model_evenly() -> None:
    plan = planned(GPUS, 400 * GB, Where("balanced"))
    assert plan.devices.keys() == {gpu.id for gpu in GPUS}
    # 50 GB of weights, their keys and values, what a step and a process need, and room for a layer.
    first, *others = plan.devices.values()
    assert all(52 * GB < count < 54 * GB for count in others)
    assert first == pytest.approx(others[0] + GB, rel=0.01)
    assert sum(plan.weight_room.values()) == pytest.approx(409 * GB, rel=0.001)
    assert plan.computing == 8


def test_balanced_uses_all_accelerators_where_auto_uses_one() -> None:
    assert list(planned(GPUS, 20 * GB, Where("auto")).devices) == ["cuda:0"]
    assert len(planned(GPUS, 20 * GB, Where("balanced")).devices) == 8
    assert list(planned(GPUS[:1], 20 * GB, Where("balanced")).devices) == ["cuda:0"]


def test_sequential_uses_no_more_than_it_needs_in_their_order() -> None:
    assert list(planned(GPUS, 20 * GB, Where("sequential")).devices) == ["cuda:0"]
    plan = planned(GPUS, 200 * GB, Where("sequential"))
    assert list(plan.devices) == ["cuda:0", "cuda:1", "cuda:2"]
    assert plan.devices["cuda:0"] == plan.devices["cuda:1"] == 80 * GB
    assert plan.devices["cuda:2"] < 80 * GB


def test_mixed_accelerators_get_what_they_can_hold() -> None:
    plan = planned(MIXED, 90 * GB, Where("balanced"))
    assert plan.devices["cuda:1"] == plan.devices["cuda:2"] == 24 * GB
    assert 50 * GB < plan.devices["cuda:0"] < 60 * GB
    assert not planned(MIXED, 130 * GB, Where("balanced")).fits


def test_an_accelerator_that_others_fill_is_left_out() -> None:
    box = book(*GPUS[:3], BIG_CPU)
    box.reserve("m:1", "org/a", {"cuda:1": 77 * GB})
    plan = place(box, needs(100 * GB, largest=GB), Where("balanced"))
    assert list(plan.devices) == ["cuda:0", "cuda:2"]


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
def test_without_accelerators_every_strategy_is_the_cpu(strategy: str) -> None:
    plan = planned([], 20 * GB, Where(strategy))
    assert list(plan.devices) == ["cpu"]
    assert not plan.weight_room


def test_bounds_are_room_that_is_not_there() -> None:
    bounds = tuple((gpu.id, 30 * GB) for gpu in GPUS[:7])
    plan = planned(GPUS, 60 * GB, Where("auto", max_memory=bounds))
    assert list(plan.devices) == ["cuda:7"]
    plan = planned(GPUS, 150 * GB, Where("balanced", max_memory=bounds))
    assert all(plan.devices[gpu.id] <= 30 * GB for gpu in GPUS[:7])
    refused = planned(GPUS[:2], 90 * GB, Where("balanced", max_memory=bounds[:2]))
    assert not refused.fits
    assert refused.free_bytes == 60 * GB
    with pytest.raises(UnsupportedOptionError, match="'xpu:0'"):
        planned(GPUS, GB, Where(max_memory=(("xpu:0", GB),)))


def test_what_does_not_fit_goes_to_main_memory_where_it_may() -> None:
    assert not planned(GPUS[:1], 100 * GB, Where()).fits
    plan = planned(GPUS[:1], 100 * GB, Where(offload=OFFLOAD_CPU))
    assert plan.devices["cuda:0"] == 80 * GB
    assert plan.offloaded.keys() == {"cpu"}
    assert plan.weight_room["cuda:0"] + plan.weight_room["cpu"] >= 100 * GB
    assert plan.devices["cpu"] > plan.offloaded["cpu"] > 20 * GB
    assert not planned(GPUS[:1], 200 * GB, Where(offload=OFFLOAD_CPU)).fits


def test_what_main_memory_does_not_hold_goes_to_the_disk_where_it_may() -> None:
    plan = planned(GPUS[:1], 200 * GB, Where(offload=OFFLOAD_DISK))
    assert plan.devices == {"cuda:0": 80 * GB, "cpu": 60 * GB}
    assert 60 * GB < plan.offloaded["disk"] < 80 * GB
    plan = planned([], 200 * GB, Where(offload=OFFLOAD_DISK))
    assert plan.devices == {"cpu": 60 * GB}
    assert plan.offloaded.keys() == {"disk"}
    bounds = (("cpu", 0),)
    plan = planned(GPUS[:1], 200 * GB, Where(max_memory=bounds, offload=OFFLOAD_DISK))
    assert plan.devices == {"cuda:0": 80 * GB}
    assert plan.offloaded["disk"] > 120 * GB


def test_what_fits_is_not_offloaded_though_it_may_be() -> None:
    for offload in (OFFLOAD_CPU, OFFLOAD_DISK):
        plan = planned(GPUS, 60 * GB, Where(offload=offload))
        assert (list(plan.devices), plan.offloaded) == (["cuda:0"], {})


def test_unified_memory_is_not_used_twice_to_offload() -> None:
    apple = replace(BIG_CPU, id="mps:0", total_bytes=40 * GB, shares="cpu")
    plan = planned([apple], 50 * GB, Where(offload=OFFLOAD_CPU))
    assert plan.devices.keys() == {"mps:0", "cpu"}
    assert sum(plan.devices.values()) <= 60 * GB
    assert not planned([apple], 58 * GB, Where(offload=OFFLOAD_CPU)).fits
    assert planned([apple], 30 * GB, Where("mps")).devices.keys() == {"mps:0"}


def shape(layers: int, numbers: int) -> ModelShape:
    names = [f"model.layers.{index}.mlp.weight" for index in range(layers)]
    tensors = tuple(Tensor(name, (numbers,), 2 * numbers) for name in names)
    return ModelShape(layers * numbers, 2 * layers * numbers, 0, 0, False, {}, tensors)


def mapped(modules: dict[str, str], *devices: MemoryDevice) -> Placement:
    found = estimate(shape(10, 5 * GB), 2, on_accelerator=True, modules=modules)
    where = Where(module_map=tuple(sorted(modules.items())))
    return place(book(*devices, BIG_CPU), found.needs, where)


def test_a_module_map_is_planned_as_it_says() -> None:
    modules = {f"model.layers.{index}": f"cuda:{index // 5}" for index in range(10)}
    plan = mapped(modules, *GPUS)
    assert plan.devices.keys() == {"cuda:0", "cuda:1"}
    assert all(50 * GB < count < 55 * GB for count in plan.devices.values())
    plan = mapped({**modules, "model.layers.9": "cpu", "model.layers.8": "disk"}, *GPUS)
    assert plan.offloaded == {"cpu": 10 * GB, "disk": 10 * GB}
    assert plan.devices["cpu"] > 10 * GB
    assert not mapped({"model": "cuda:0"}, *GPUS).fits
    assert mapped({"": "disk"}).devices.keys() == {"cpu"}
    with pytest.raises(UnsupportedOptionError, match="'cuda:8'"):
        mapped({"": "cuda:8"}, *GPUS)


def test_the_most_precise_name_of_a_module_map_counts() -> None:
    plan = mapped({"": "cuda:1", "model.layers": "disk", "model.layers.3": "cuda:0"}, *GPUS)
    assert 10 * GB < plan.devices["cuda:0"] < 25 * GB
    assert plan.devices["cuda:1"] < 10 * GB
    assert plan.offloaded == {"disk": 90 * GB}


def test_weights_that_a_module_map_does_not_know_count_everywhere() -> None:
    plan = mapped({"transformer.h": "cuda:0", "transformer.wte": "cuda:1"}, *GPUS)
    assert not plan.fits
    assert plan.needed_bytes > 200 * GB


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"device_map": "evenly"}, "device_map"),
        ({"device_map": "disk"}, "device_map"),
        ({"max_memory": (("gpu", 1),)}, "max_memory"),
        ({"offload": 9}, "offload"),
        ({"module_map": (("model", "gpu"),)}, "module_map"),
        ({"module_map": (("", "cpu"),), "device_map": "cpu"}, "module_map"),
        ({"module_map": (("", "cpu"),), "max_memory": (("cpu", 1),)}, "module_map"),
        ({"module_map": (("", "cpu"),), "offload": OFFLOAD_DISK}, "module_map"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Where(**options)
    assert caught.value.field == f"options.{field}"


@pytest.mark.parametrize(
    "where",
    [
        Where(offload=OFFLOAD_CPU),
        Where(module_map=(("", "disk"),)),
        Where(module_map=(("a", "cpu"), ("b", "cuda:0"))),
    ],
)
def test_what_is_quantized_cannot_be_offloaded(where: Where) -> None:
    with pytest.raises(UnsupportedOptionError, match="offloaded"):
        LoadOptions(quantization=QUANTIZATION_INT8, where=where)


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=8),
    st.builds(Needs, *[st.integers(0, 80)] * 5),
)
def test_a_placement_is_within_what_is_there(free: list[int], wanted: Needs) -> None:
    devices = [MemoryDevice(f"cuda:{i}", 100, room, 0.0) for i, room in enumerate(free)]
    box = book(*devices)
    placement = place(box, wanted, Where("auto"))
    if placement.fits:
        assert sum(placement.devices.values()) == placement.needed_bytes
        assert all(count <= box.available(device) for device, count in placement.devices.items())
        box.reserve("m:1", "org/a", placement.devices)


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=8),
    st.integers(0, 100),
    st.builds(Needs, *[st.integers(0, 80)] * 7),
    st.sampled_from(["auto", "balanced", "sequential", "cuda:0"]),
    st.sampled_from([OFFLOAD_UNSPECIFIED, OFFLOAD_CPU, OFFLOAD_DISK]),
)
def test_every_placement_is_within_what_is_there_and_holds_the_weights(
    free: list[int], main: int, wanted: Needs, device_map: str, offload: Offload.ValueType
) -> None:
    devices = [MemoryDevice(f"cuda:{i}", 100, room, 0.0) for i, room in enumerate(free)]
    box = book(*devices, MemoryDevice("cpu", 100, main, 0.0))
    plan = place(box, wanted, Where(device_map, offload=offload))
    if not plan.fits:
        assert plan.devices == plan.weight_room == plan.offloaded == {}
        return
    assert sum(plan.devices.values()) == plan.needed_bytes
    assert plan.weight_room.keys() <= plan.devices.keys()
    assert all(room <= plan.devices[device] for device, room in plan.weight_room.items())
    if plan.weight_room:
        held = sum(plan.weight_room.values()) + plan.offloaded.get("disk", 0)
        assert held >= wanted.weights
    if offload == OFFLOAD_UNSPECIFIED:
        assert "cpu" not in plan.devices
        assert not plan.offloaded
    box.reserve("m:1", "org/a", plan.devices)
