"""The devices of this box, as torch sees them."""

from __future__ import annotations

import re

import psutil
import torch

from loaderd.server.box.cpu import CPU, cpu, own_bytes
from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.v1.system_pb2 import Device, DeviceType

AUTO = "auto"
BALANCED = "balanced"
SEQUENTIAL = "sequential"
DISK = "disk"

_STRATEGIES = (AUTO, BALANCED, SEQUENTIAL)
_INDEX = re.compile(r"0|[1-9][0-9]{0,3}")
_ACCELERATORS = {
    "cuda": DeviceType.DEVICE_TYPE_CUDA,
    "mps": DeviceType.DEVICE_TYPE_MPS,
    "xpu": DeviceType.DEVICE_TYPE_XPU,
}
_DEVICE_MAP = "options.device_map"


def inventory() -> list[Device]:
    """Accelerators first, the CPU last."""
    return [*accelerators(), cpu()]


def accelerators() -> list[Device]:
    """The accelerators that this release of torch can use."""
    kind = accelerator_kind()
    if kind is None:
        return []
    return [_accelerator(kind, index) for index in range(torch.accelerator.device_count())]


def accelerator_kind() -> str | None:
    """The kind of accelerators that this box has, such as "cuda"; None if it has none."""
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator().type
    return kind if kind in _ACCELERATORS else None


def allocated_bytes() -> int:
    """Memory that torch holds on accelerators for this process."""
    return sum(held for device, held in held_bytes().items() if device != CPU)


def held_bytes() -> dict[str, int]:
    """Memory that this process holds, by device; see `own_bytes` for the CPU."""
    held = {CPU: own_bytes(psutil.Process())}
    kind = accelerator_kind()
    if kind == "mps":
        held["mps:0"] = int(torch.mps.driver_allocated_memory())
    elif kind is not None:
        for index in range(torch.accelerator.device_count()):
            held[f"{kind}:{index}"] = int(torch.get_device_module(kind).memory_reserved(index))
    return held


def release_cached_memory() -> None:
    """Gives back accelerator memory that torch keeps for later."""
    if accelerator_kind() is not None:
        torch.accelerator.empty_cache()


def wait_for(device: torch.device) -> None:
    """Waits until a device has computed all that was asked of it."""
    if device.type in _ACCELERATORS:
        torch.accelerator.synchronize(device)


def is_device(device_map: str) -> bool:
    """Whether a device map is a device, and no way to find some."""
    return device_map not in _STRATEGIES


def check_device_map(device_map: str) -> None:
    """Checks LoadOptions.device_map.

    Raises:
        InvalidArgumentError: It is neither a way to find devices nor a device's name.
        UnsupportedOptionError: The box has no such device.
    """
    if is_device(device_map):
        check_device(device_map, _DEVICE_MAP)


def check_device(name: str, field: str) -> None:
    """Checks a device's name.

    Args:
        name: Such as "cpu" or "cuda:0".
        field: Where it was given, for the error.

    Raises:
        InvalidArgumentError: It is none.
        UnsupportedOptionError: The box has no such device.
    """
    kind, colon, index = name.partition(":")
    if name == CPU:
        return
    if kind not in _ACCELERATORS or (colon and not _INDEX.fullmatch(index)):
        problem = (
            f'{name!r} is not "auto", "balanced", "sequential", "cpu" or a device such as "cuda:0"'
            if field == _DEVICE_MAP
            else f'{name!r} is not "cpu" or a device such as "cuda:0"'
        )
        raise InvalidArgumentError(field, problem)
    count = torch.accelerator.device_count() if accelerator_kind() == kind else 0
    if int(index or 0) >= count:
        raise UnsupportedOptionError(field, f"this box has no device {name!r}")


def uses_accelerator(device_map: str) -> bool:
    """Whether a model with this device map has layers on an accelerator."""
    return device_map != CPU and accelerator_kind() is not None


def kind_of(device_map: str) -> str:
    """The kind of device that a model with this device map is computed on, such as "cuda"."""
    if not is_device(device_map):
        return accelerator_kind() or CPU
    return device_map.partition(":")[0]


def named(device_map: str) -> list[Device]:
    """The devices that a device map means."""
    if is_device(device_map):
        wanted = device_map if ":" in device_map or device_map == CPU else f"{device_map}:0"
        return [device for device in inventory() if device.id == wanted]
    return accelerators() or [cpu()]


def free_bytes(device_map: str) -> int:
    """Memory that a model with this device map can have."""
    return sum(device.free_bytes for device in named(device_map))


def name_of(device: torch.device) -> str:
    """A device's name in a device map."""
    if device.type != CPU and device.index is None:
        return f"{device.type}:0"
    return str(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device could not hold what was asked of it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator and Metal's have no exception class of their own.
    texts = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_broken(error: BaseException) -> bool:
    """Whether a device will answer nothing any more in this process, such as after a failed assert.

    CUDA reports such an error again at every later call.
    """
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _accelerator(kind: str, index: int) -> Device:
    if kind == "mps":
        total = int(torch.mps.recommended_max_memory())
        used = int(torch.mps.driver_allocated_memory())
        name = "Apple GPU"
    else:
        properties = torch.get_device_module(kind).get_device_properties(index)
        total, name = int(properties.total_memory), properties.name
        used = _used_bytes(kind, index, total)
    return Device(
        id=f"{kind}:{index}",
        type=_ACCELERATORS[kind],
        name=name,
        total_bytes=total,
        free_bytes=max(total - used, 0),
    )


def _used_bytes(kind: str, index: int, total: int) -> int:
    """Memory in use on a device, by all processes.

    The driver's management library tells it without opening a context on the device, which
    takes hundreds of megabytes that a standby should not hold; it is an optional package.
    """
    module = torch.get_device_module(kind)
    try:
        return int(module.device_memory_used(index))
    except (ImportError, RuntimeError):
        free, _ = module.mem_get_info(index)
        return total - int(free)
