from dataclasses import dataclass
from typing import Any

import pytest
import torch

from loaderd.server.box import cpu as cpu_module
from loaderd.server.box.cgroup import MemoryBound
from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker import devices
from loaderd.v1.system_pb2 import DeviceType

GIB = 2**30


@dataclass
class Properties:
    name: str
    total_memory: int


class Gpus:
    """Two GPUs of 80 and 40 GiB; what torch's module of such devices says of them."""

    has_management_library = True

    def get_device_properties(self, index: int) -> Properties:
        return Properties("NVIDIA H100", (80 * GIB, 40 * GIB)[index])

    def device_memory_used(self, index: int) -> int:
        if not self.has_management_library:
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")
        return (10 * GIB, 0)[index]

    def mem_get_info(self, index: int) -> tuple[int, int]:
        total = self.get_device_properties(index).total_memory
        return total - (11 * GIB, GIB)[index], total

    def memory_reserved(self, index: int) -> int:
        return (3 * GIB, 2 * GIB)[index]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    gpus = Gpus()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: gpus)
    return gpus


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_accelerators_come_first_the_cpu_last(gpus: Gpus) -> None:
    found = devices.inventory()
    assert [device.id for device in found] == ["cuda:0", "cuda:1", "cpu"]
    assert [device.type for device in found[:2]] == [DeviceType.DEVICE_TYPE_CUDA] * 2
    assert [device.total_bytes // GIB for device in found[:2]] == [80, 40]
    assert [device.free_bytes // GIB for device in found[:2]] == [70, 40]
    assert found[0].name == "NVIDIA H100"
    assert found[0].cores == 0


def test_without_the_management_library_the_device_is_asked(gpus: Gpus) -> None:
    gpus.has_management_library = False
    assert [device.free_bytes // GIB for device in devices.accelerators()] == [69, 39]


def test_memory_held_and_memory_to_have(gpus: Gpus) -> None:
    assert devices.allocated_bytes() == 5 * GIB
    assert devices.free_bytes("cuda:1") == devices.free_bytes("cuda:1") == 40 * GIB
    assert devices.free_bytes("cuda") == 70 * GIB
    for device_map in ("auto", "balanced", "sequential"):
        assert devices.free_bytes(device_map) == 110 * GIB


def test_the_accelerator_is_used_unless_the_cpu_is_asked_for(gpus: Gpus) -> None:
    assert devices.uses_accelerator("auto")
    assert devices.uses_accelerator("cuda:1")
    assert not devices.uses_accelerator("cpu")


def test_without_accelerators(no_gpus: None) -> None:
    assert [device.id for device in devices.inventory()] == ["cpu"]
    assert devices.allocated_bytes() == 0
    assert not devices.uses_accelerator("auto")


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", "cpu", "cuda", "cuda:0", "cuda:1"]
)
def test_devices_that_are_there(gpus: Gpus, device_map: str) -> None:
    devices.check_device_map(device_map)


@pytest.mark.parametrize("device_map", ["cuda:2", "xpu", "mps:0"])
def test_devices_that_are_not_there(gpus: Gpus, device_map: str) -> None:
    with pytest.raises(UnsupportedOptionError):
        devices.check_device_map(device_map)


@pytest.mark.parametrize("device_map", ["", "CPU", "cpu:0", "cuda:", "cuda:1x", "cuda:²", "meta"])
def test_what_is_no_device(gpus: Gpus, device_map: str) -> None:
    with pytest.raises(InvalidArgumentError):
        devices.check_device_map(device_map)


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "cpu"), ("mps", "mps:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_devices_have_the_names_of_a_device_map(device: str, name: str) -> None:
    assert devices.name_of(torch.device(device)) == name


def test_control_groups_bound_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [MemoryBound(limit=1000, used=400), MemoryBound(limit=900, used=100)]
    monkeypatch.setattr(cpu_module, "memory_bounds", lambda: bounds)
    monkeypatch.setattr(cpu_module, "core_bounds", lambda: [1, 500])
    cpu = cpu_module.cpu()
    assert (cpu.total_bytes, cpu.free_bytes, cpu.cores) == (900, 600, 1)
    assert cpu.name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Any, expected: bool) -> None:
    assert devices.is_out_of_memory(error) is expected
