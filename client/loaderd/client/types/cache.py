"""Model files on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias, overload

from loaderd.client.types.download import Download, DownloadPlan


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One revision of one repository on disk."""

    repo_id: str
    """`org/name`."""
    commit: str
    """40 hex digits."""
    refs: tuple[str, ...]
    """Branches and tags that point to it in the cache."""
    size_bytes: int
    """Bytes of its files, those that it shares with other snapshots included."""
    unique_bytes: int
    """Bytes of the files that no other snapshot shares: what deleting it frees."""
    file_count: int
    """Number of its files."""
    complete: bool
    """Whether all files that loading needs are there."""
    modified_at: datetime | None
    """When one of its files was last added, in UTC."""
    last_used_at: datetime | None
    """When it was last used, in UTC: loaded or downloaded by a daemon, or one of its files was
    read, as far as the file system keeps count."""
    path: str
    """Its folder on the daemon's box."""
    stale: bool
    """Set by a download, and by `resolve` with `refresh`, when the hub did not answer or must not
    be asked, and this is what the cache had: it may be older than what the revision is now."""
    in_use_by: tuple[str, ...]
    """Who uses it: ids of loaded models, "download" and "verification"; in plans of deletions also
    "another process"."""

    @property
    def revision(self) -> str:
        """A revision to name it by: the first of its branches and tags, else its commit."""
        return self.refs[0] if self.refs else self.commit


@dataclass(frozen=True, kw_only=True)
class SnapshotList(Sequence[Snapshot]):
    """The snapshots in the cache, by repository name, then the most recently changed first."""

    snapshots: tuple[Snapshot, ...]
    total_bytes: int
    """The disk space that they take; files that several of them share count once."""
    orphan_bytes: int
    """Bytes of what belongs to no snapshot: unfinished files of downloads, and files whose
    snapshots are gone."""
    downloads: tuple[Download, ...]
    """The downloads under way."""
    free_bytes: int
    """Free bytes of the cache's disk."""
    max_bytes: int | None
    """The operator's limit of the cache's size; None: there is none."""

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Snapshot, ...]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | tuple[Snapshot, ...]:
        return self.snapshots[index]

    def __len__(self) -> int:
        return len(self.snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.snapshots)


@dataclass(frozen=True, kw_only=True)
class LocalFolder:
    """A local folder that holds a model."""

    path: str
    """Its real path on the daemon's box."""
    size_bytes: int
    """Bytes of the files that loading needs."""


Resolution: TypeAlias = LocalFolder | Snapshot | DownloadPlan
"""Where a name's files are: a folder, a complete snapshot, or on the hub."""


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What was, or in a plan would be, deleted."""

    snapshots: tuple[Snapshot, ...]
    """The snapshots, as they were."""
    freed_bytes: int
    """Bytes that the disk gets back, those of orphans included."""
    orphan_files: int
    """Number of unfinished and left-over files that go."""
    kept: tuple[Snapshot, ...]
    """Snapshots that were meant too and stay because they are in use; see `in_use_by`."""
    remaining_bytes: int
    """Bytes that the cache takes afterwards."""
