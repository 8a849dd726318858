"""The daemon and its box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from loaderd.client.types.enums import DeviceType


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Version, uptime, settings and abilities of the daemon."""

    version: str
    """Its release."""
    started_at: datetime | None
    """When it started, in UTC."""
    uptime: timedelta
    """How long it has been running."""
    pid: int
    """Its process id."""
    cache_dir: str
    """The folder of its Hugging Face cache."""
    local_roots: tuple[str, ...]
    """Folders below which local models may be loaded."""
    hub_endpoint: str
    """The hub that it downloads from."""
    offline: bool
    """Whether it never asks the hub."""
    draining: bool
    """Whether it is shutting down and refuses new work."""
    standby_workers: int
    """Worker processes that wait for a load."""
    versions: Mapping[str, str] = field(hash=False)
    """Releases of Python and of the workers' libraries, by name."""
    capabilities: tuple[str, ...]
    """Optional abilities of this daemon."""
    active_requests: int
    """Requests on models that run or wait now, of all models."""
    clients: int
    """Clients with a call under way, or one within the last minute, this one included. A client
    is a TCP connection; all who use a unix socket are one."""


@dataclass(frozen=True, kw_only=True)
class MemoryHolder:
    """A model that has memory of a device."""

    model_id: str
    """The model's id."""
    name: str
    """Its name."""
    bytes: int
    """How much."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device."""

    id: str
    """Its name as a `device_map`, for example "cuda:0"."""
    type: DeviceType
    """Its kind."""
    name: str
    """Its name for people."""
    total_bytes: int
    """Its memory."""
    free_bytes: int
    """Memory that is free: of the CPU now, of an accelerator when it was last looked at."""
    reserved_bytes: int
    """Memory that models have reserved: what loads will need, and what loaded models hold."""
    taken_bytes: int
    """Of the reserved memory, what loads have really taken."""
    holders: tuple[MemoryHolder, ...]
    """Whose that is, the most first."""
    available_bytes: int
    """What a load could have now: free, and reserved by nobody."""
    cores: int | None
    """Cores that the daemon may use; None for accelerators."""
