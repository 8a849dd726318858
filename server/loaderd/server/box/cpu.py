"""The processors and the main memory of this box, as they are now."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from loaderd.server.box.cgroup import core_bounds, memory_bounds
from loaderd.v1.system_pb2 import Device, DeviceType

CPU = "cpu"


def cpu() -> Device:
    """The processors and the main memory, within what control groups allow."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for bound in memory_bounds():
        total = min(total, bound.limit)
        free = min(free, max(bound.limit - bound.used, 0))
    return Device(
        id=CPU,
        type=DeviceType.DEVICE_TYPE_CPU,
        name=_cpu_name(),
        total_bytes=total,
        free_bytes=free,
        cores=cores(),
    )


def own_bytes(process: psutil.Process) -> int:
    """Main memory of a process, without the pages of mapped files where that is known."""
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def cores() -> int:
    """Cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return max(1, min([allowed or os.cpu_count() or 1, *core_bounds()]))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
