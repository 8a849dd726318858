"""What the kernel's control groups leave this process of the box; containers live in one.

Interface: https://docs.kernel.org/admin-guide/cgroup-v2.html, and for version 1
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """A group's memory, in bytes.

    Attributes:
        limit: Most that its processes may use together.
        used: What they use, without file caches, which the kernel gives up when asked.
    """

    limit: int
    used: int


def memory_bounds(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> list[MemoryBound]:
    """The bounds of this process's groups that have one."""
    bounds = []
    for group in _groups("memory", mount, membership):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            bounds.append(MemoryBound(limit, max(used - _file_cache(group / "memory.stat"), 0)))
    return bounds


def core_bounds(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> list[int]:
    """The cores' worth of time that this process's groups may use, rounded up."""
    bounds = []
    for group in _groups("cpu", mount, membership):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                bounds.append(math.ceil(int(quota) / int(period)))
        else:
            limit, every = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
            if limit is not None and every and limit > 0:
                bounds.append(math.ceil(limit / every))
    return bounds


def _groups(controller: str, mount: Path, membership: Path) -> Iterator[Path]:
    """Folders of the groups that bound this process, from its own up to the mounted root.

    In a container the root of the mount is often the process's own group, whatever path the
    membership tells; so paths that are not there are skipped.
    """
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = mount / controller
        elif not controllers:
            root = mount
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_dir():
                yield folder
            if folder == root:
                break


def _number(*candidates: Path) -> int | None:
    """What the first of the files that is there holds; None for "max"."""
    for path in candidates:
        if path.exists():
            text = path.read_text().strip()
            return None if text == "max" else int(text)
    return None


def _file_cache(stat: Path) -> int:
    if not stat.exists():
        return 0
    lines = (line.split() for line in stat.read_text().splitlines())
    values = {name: int(value) for name, value in lines}
    prefix = "total_" if "total_inactive_file" in values else ""
    return values.get(f"{prefix}inactive_file", 0) + values.get(f"{prefix}active_file", 0)
