"""Where a load wants its layers: the part of its options that says so."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.v1.model_pb2 import Offload

AUTO = "auto"
BALANCED = "balanced"
SEQUENTIAL = "sequential"
CPU = "cpu"
DISK = "disk"

ModuleMap: TypeAlias = tuple[tuple[str, str], ...]
"""Module names and the device of each, sorted; hashable, for it is part of a model's key."""

_DEVICE = re.compile(r"cpu|mps(:0)?|(cuda|xpu):(0|[1-9]\d{0,2})")
_DEVICE_NAMES = '"cpu", "mps", "cuda:N" or "xpu:N"'
_STRATEGIES = (AUTO, BALANCED, SEQUENTIAL)


@dataclass(frozen=True)
class Where:
    """Where layers may go.

    Attributes:
        device_map: "auto", "balanced", "sequential" or a device; not read with a module map.
        module_map: Where the request says it for each module; empty: it does not.
        max_memory: Most bytes of a device, for those that have a bound.
        offload: Whether what does not fit may go to main memory, or further to the disk.

    Raises:
        InvalidArgumentError: A value is out of bounds, or two do not go together.
    """

    device_map: str = AUTO
    module_map: ModuleMap = ()
    max_memory: tuple[tuple[str, int], ...] = ()
    offload: Offload.ValueType = Offload.OFFLOAD_UNSPECIFIED

    def __post_init__(self) -> None:
        if self.device_map not in _STRATEGIES and not _DEVICE.fullmatch(self.device_map):
            known = f'"auto", "balanced", "sequential", {_DEVICE_NAMES}'
            problem = f"{self.device_map!r} is none of {known}"
            raise InvalidArgumentError("options.device_map", problem)
        for device, _ in self.max_memory:
            if not _DEVICE.fullmatch(device):
                raise InvalidArgumentError(
                    "options.max_memory", f"{device!r} is none of {_DEVICE_NAMES}"
                )
        if self.offload not in Offload.values():
            problem = f"there is no offload number {self.offload}"
            raise InvalidArgumentError("options.offload", problem)
        if self.module_map:
            self._check_module_map()

    @property
    def device(self) -> str | None:
        """The id of the one device that it names; None where it names none."""
        return None if self.device_map in _STRATEGIES else _id(self.device_map)

    @property
    def modules(self) -> dict[str, str]:
        """Device ids by module name."""
        return {module: _id(device) for module, device in self.module_map}

    @property
    def may_use_disk(self) -> bool:
        """Whether layers may go to the disk."""
        return self.offload == Offload.OFFLOAD_DISK or DISK in self.modules.values()

    @property
    def may_offload(self) -> bool:
        """Whether layers may be elsewhere than where they are computed."""
        places = {*self.modules.values()}
        return bool(self.offload) or DISK in places or (CPU in places and len(places) > 1)

    @property
    def bounds(self) -> dict[str, int]:
        """Most bytes of devices, by their ids."""
        return {_id(device): most for device, most in self.max_memory}

    @property
    def names_accelerators(self) -> bool:
        """Whether it names devices other than the CPU, which a box may lack."""
        return any(device != CPU for _, device in self._named())

    def uses_accelerator(self, devices: Collection[str]) -> bool:
        """Whether layers are computed on accelerators, of a box with these devices."""
        named = {*self.modules.values()} if self.module_map else {self.device}
        if named == {None}:
            return any(device != CPU for device in devices)
        return bool(named - {CPU, DISK})

    def check(self, devices: Collection[str]) -> None:
        """Refuses devices that a box does not have.

        Raises:
            UnsupportedOptionError: It names one.
        """
        for field, device in self._named():
            if _id(device) not in devices:
                raise UnsupportedOptionError(field, f"this box has no device {device!r}")

    def _named(self) -> list[tuple[str, str]]:
        """The devices that it names, each with the field that does."""
        named = [("options.device_map", self.device_map)] if self.device else []
        named += [("options.module_map", device) for _, device in self.module_map if device != DISK]
        named += [("options.max_memory", device) for device, _ in self.max_memory]
        return named

    def _check_module_map(self) -> None:
        field = "options.module_map"
        for module, device in self.module_map:
            if device != DISK and not _DEVICE.fullmatch(device):
                problem = f'{device!r} for {module!r} is none of "disk", {_DEVICE_NAMES}'
                raise InvalidArgumentError(field, problem)
        beside = {
            "device_map": self.device_map != AUTO,
            "max_memory": bool(self.max_memory),
            "offload": bool(self.offload),
        }
        for other, is_given in beside.items():
            if is_given:
                problem = f"says itself what {other} would; give one of the two"
                raise InvalidArgumentError(field, problem)


def _id(device: str) -> str:
    """A device's id, which has an index for all but the CPU."""
    return "mps:0" if device == "mps" else device
