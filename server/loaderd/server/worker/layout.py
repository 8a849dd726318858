"""Where the layers of a model are to go. accelerate finds the device of each one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from loaderd.server.box.cpu import CPU
from loaderd.server.errors import DeviceMemoryError, InvalidArgumentError
from loaderd.server.worker import devices
from loaderd.server.worker.devices import DISK, SEQUENTIAL

Place: TypeAlias = str | int
"""As accelerate calls a device: an accelerator's index, "mps", "cpu" or "disk"."""

_MODULE_MAP = "options.module_map"
_INDEXED = re.compile(r"(?:cuda|xpu):(\d+)")


@dataclass(frozen=True)
class Layout:
    """Where the layers of a model may go.

    Attributes:
        device_map: "auto" and "balanced" (all accelerators, evenly), "sequential" (one after the
            other), on a box without accelerators all of these the CPU; a device; or the device,
            or "disk", of each module.
        max_memory: Most bytes of weights on each device; what it does not name gets none. None:
            what is free of those that `device_map` and `offload` mean.
        offload: Where layers may go that do not fit: nowhere, "cpu", or "disk" after that.
        folder: For weights on the disk that cannot be read from the model's files.
    """

    device_map: str | Mapping[str, str] = devices.AUTO
    max_memory: Mapping[str, int] | None = None
    offload: str = ""
    folder: Path | None = None

    def check(self) -> None:
        """Checks it against this box.

        Raises:
            InvalidArgumentError: It names what is no device.
            UnsupportedOptionError: It names a device that the box does not have.
        """
        if isinstance(self.device_map, str):
            devices.check_device_map(self.device_map)
        else:
            for device in {*self.device_map.values()} - {DISK}:
                devices.check_device(device, _MODULE_MAP)
        for device in self.max_memory or {}:
            devices.check_device(device, "options.max_memory")

    @property
    def main(self) -> str:
        """The device map that means the devices which compute; "cpu" if that does."""
        if isinstance(self.device_map, str):
            return self.device_map
        accelerators = {*self.device_map.values()} - {CPU, DISK}
        return min(accelerators, key=lambda device: (len(device), device), default=CPU)

    @property
    def kind(self) -> str:
        """The kind of device that it is computed on, such as "cuda"."""
        return devices.kind_of(self.main)

    @property
    def may_offload(self) -> bool:
        """Whether layers may be elsewhere than where they are computed."""
        if isinstance(self.device_map, str):
            return bool(self.offload)
        places = {*self.device_map.values()}
        return DISK in places or (CPU in places and self.main != CPU)

    @property
    def free_bytes(self) -> int | None:
        """Memory that weights can have; None where the disk holds what is too much."""
        named = {self.offload} if isinstance(self.device_map, str) else {*self.device_map.values()}
        if DISK in named:
            return None
        if self.max_memory is not None:
            return sum(self.max_memory.values())
        if isinstance(self.device_map, str):
            beside = devices.free_bytes(CPU) if self.offload and self.kind != CPU else 0
            return devices.free_bytes(self.device_map) + beside
        return sum(devices.free_bytes(device) for device in named)

    def arguments(self) -> dict[str, Any]:
        """What from_pretrained is asked for where it is to find the devices itself."""
        if not isinstance(self.device_map, str):
            return {"device_map": _places(self.device_map)}
        if not self._is_spread:
            return {"device_map": CPU if self.kind == CPU else self.device_map}
        strategy = SEQUENTIAL if devices.is_device(self.device_map) else self.device_map
        return {"device_map": strategy, "max_memory": self._room()}

    def mapped(
        self, config: PreTrainedConfig, dtype: torch.dtype, model: str, needed: int
    ) -> dict[str, Any]:
        """As `arguments`, with the devices found before anything is read.

        Args:
            config: The model's.
            dtype: Of its weights.
            model: Its name, for errors.
            needed: Bytes of its weights, for errors.

        Raises:
            InvalidArgumentError: A module map does not fit the model.
            DeviceMemoryError: Layers would have to go where they may not.
        """
        arguments = self.arguments()
        if not self._is_spread and isinstance(self.device_map, str):
            return arguments
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if not isinstance(self.device_map, str):
            modules = _ModuleMap(empty, self.device_map, self.main)
            modules.check()
            return {"device_map": _places(modules.disjoint())}
        room, whole = arguments["max_memory"], empty._no_split_modules
        if arguments["device_map"] != SEQUENTIAL:
            room = get_balanced_memory(empty, room, whole)
        found = infer_auto_device_map(empty, room, whole)
        self.check_spill(found, model, needed)
        return {"device_map": dict(found)}

    def check_spill(self, found: Mapping[str, Any], model: str, needed: int) -> None:
        """Refuses what accelerate puts where it may not be.

        Args:
            found: The device of each module.
            model: The model's name, for the error.
            needed: Bytes of its weights, for the error.

        Raises:
            DeviceMemoryError: Layers are there.
        """
        if not isinstance(self.device_map, str):
            return
        places = {str(place) for place in found.values()}
        allowed = {CPU, DISK} if self.offload == DISK else {CPU}
        if self.offload or self.kind == CPU:
            places -= allowed
        if places & {CPU, DISK}:
            raise DeviceMemoryError(model, needed, self.free_bytes)

    @property
    def _is_spread(self) -> bool:
        """Whether accelerate is to look for the devices."""
        if self.max_memory is not None or self.offload == DISK:
            return True
        return self.kind != CPU and (bool(self.offload) or not devices.is_device(self.main))

    def _room(self) -> dict[Place, int]:
        """Bytes of weights by device."""
        if self.max_memory is not None:
            return {_place(device): most for device, most in self.max_memory.items()}
        main = devices.named(self.main)
        if self.offload and self.kind != CPU:
            main += devices.named(CPU)
        return {_place(each.id): each.free_bytes for each in main}


def _places(device_map: Mapping[str, str]) -> dict[str, Place]:
    return {name: _place(device) for name, device in device_map.items()}


def _place(device: str) -> Place:
    indexed = _INDEXED.fullmatch(device)
    return int(indexed[1]) if indexed else device.partition(":")[0]


@dataclass(frozen=True)
class _ModuleMap:
    """The device of each module, as a request names them, against an empty model.

    Attributes:
        model: Without weights.
        places: Device by module.
        main: The device for what has no weights and is in no module of the map.
    """

    model: PreTrainedModel
    places: Mapping[str, str]
    main: str

    def check(self) -> None:
        """Checks that it fits the model.

        Raises:
            InvalidArgumentError: A name is no module, a weight has no device, or what belongs
                together is divided.
        """
        weights = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        known = {name for name, _ in self.model.named_modules()} | {*weights}
        for name in self.places:
            if name not in known:
                raise InvalidArgumentError(_MODULE_MAP, f"the model has no module {name!r}")
        found = {name: self._place(name) for name in weights}
        for name, place in found.items():
            if place is None:
                raise InvalidArgumentError(_MODULE_MAP, f"there is no device for {name!r}")
        for layer in self._layers():
            if len({found[name] for name in weights if name.startswith(f"{layer}.")}) > 1:
                problem = f"divides {layer!r}, which must be on one device"
                raise InvalidArgumentError(_MODULE_MAP, problem)
        for one, other in self.model.all_tied_weights_keys.items():
            if found[one] != found[other]:
                problem = f"{one!r} and {other!r} are the same weights and must be on one device"
                raise InvalidArgumentError(_MODULE_MAP, problem)

    def disjoint(self) -> dict[str, str]:
        """The same with no module inside of another one: accelerate knows no other map."""
        found: dict[str, str] = {}
        pending: list[tuple[str, nn.Module]] = [("", self.model)]
        while pending:
            name, module = pending.pop()
            prefix = f"{name}." if name else ""
            inside = [key for key in self.places if key != name and key.startswith(prefix)]
            if not inside:
                found[name] = self._place(name) or self.main
                continue
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found |= {prefix + key: self._place(prefix + key) or self.main for key, _ in own}
            children = reversed(list(module.named_children()))
            pending += [(prefix + key, child) for key, child in children]
        return found

    def _layers(self) -> list[str]:
        whole = self.model._no_split_modules or ()
        return [
            name for name, module in self.model.named_modules() if type(module).__name__ in whole
        ]

    def _place(self, name: str) -> str | None:
        """The device of the most precise module of the map that a weight or module is in."""
        while name not in self.places:
            if not name:
                return None
            name = name.rpartition(".")[0]
        return self.places[name]
