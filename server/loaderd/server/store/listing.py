"""The cache and its downloads as they are at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from loaderd.server.store.names import HubName
from loaderd.server.store.plan import DownloadState
from loaderd.server.store.scan import SnapshotInfo


@dataclass(frozen=True)
class Download:
    """A download under way, as others see it."""

    name: HubName
    state: DownloadState
    waiters: int


@dataclass(frozen=True)
class CacheListing:
    """What the cache holds now.

    Attributes:
        snapshots: By repository name, then the most recently changed first.
        total_bytes: The disk space that they take; files that several share count once.
        orphan_bytes: What belongs to no snapshot.
        downloads: Those under way.
        free_bytes: Of the cache's disk.
        max_bytes: How large downloads may make it; None: no limit.
    """

    snapshots: tuple[SnapshotInfo, ...]
    total_bytes: int
    orphan_bytes: int
    downloads: tuple[Download, ...]
    free_bytes: int
    max_bytes: int | None
