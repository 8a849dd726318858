"""What a load would take."""

from __future__ import annotations

from dataclasses import dataclass

from loaderd.client.types.enums import Dtype
from loaderd.client.types.system import MemoryHolder


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """What a model would take of one device."""

    id: str
    """The device."""
    bytes: int
    """How much of its memory."""


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Parts of the memory that a model takes of all its devices."""

    weights_bytes: int
    """The weights in their dtype, without those on the disk."""
    kv_cache_bytes: int
    """Keys and values of one sequence, the least that is of use."""
    activation_bytes: int
    """What a step computes with, on each device that computes."""
    headroom_bytes: int
    """What a process needs besides; where layers are spread, also room for whole ones."""
    copies_bytes: int
    """Copies of weights that a CPU multiplies faster; 0 where none are made."""


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a load would take, where it would go, and whether that is free now."""

    fits: bool
    """Whether a load would be let begin; if not, it would fail with `DeviceMemoryError`."""
    devices: tuple[PlannedDevice, ...]
    """Where it would go; empty when it does not fit."""
    needed_bytes: int
    """What it would take of all these devices, without what would be on the disk."""
    free_bytes: int
    """What could be had of the devices that it may be on."""
    holders: tuple[MemoryHolder, ...]
    """Which models have memory of the devices that it may be on."""
    breakdown: MemoryBreakdown
    """What `needed_bytes` is made of."""
    dtype: Dtype
    """The dtype that it would have."""
    dtype_reason: str
    """Why this dtype."""
    kv_tokens: int
    """For how many tokens keys and values are counted."""
    unknown: tuple[str, ...]
    """What is not counted because the model's configuration does not tell it."""
    offloaded_cpu_bytes: int
    """Weights that would be offloaded to main memory; at most, where no map of modules says it."""
    offloaded_disk_bytes: int
    """The same of the disk."""
