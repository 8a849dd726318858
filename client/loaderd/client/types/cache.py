"""Model files on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias, overload


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """How far a download is."""

    downloaded_bytes: int
    """Bytes that are on disk, those that the cache had before included."""
    total_bytes: int | None
    """Bytes of all files that loading needs; None while that is not known."""
    completed_files: int
    """Files that are on disk."""
    total_files: int | None
    """Files that loading needs; None while that is not known."""
    bytes_per_second: float
    """Mean rate of this download so far; 0 before the first byte."""

    @property
    def fraction(self) -> float | None:
        """The part that is done, 0 to 1; None while the total is not known."""
        return self.downloaded_bytes / self.total_bytes if self.total_bytes else None

    @property
    def remaining(self) -> timedelta | None:
        """The time left at the mean rate; None while it cannot be told."""
        if self.total_bytes is None or self.bytes_per_second <= 0:
            return None
        missing = max(self.total_bytes - self.downloaded_bytes, 0)
        return timedelta(seconds=missing / self.bytes_per_second)


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
    """Set by a download when the hub did not answer and this is what the cache had: it may be
    older than what the revision is now."""

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


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a `DownloadPlan`."""

    path: str
    """Path in the repository."""
    size_bytes: int
    """Its size."""
    cached: bool
    """Whether the cache has it already."""


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What a download would fetch."""

    repo_id: str
    """`org/name`."""
    revision: str
    """The branch, tag or commit that was asked for."""
    commit: str
    """The commit that the hub says it is now."""
    files: tuple[PlannedFile, ...]
    """Every file that loading needs."""
    total_bytes: int
    """Bytes of all those files."""
    missing_bytes: int
    """Bytes of those that are not in the cache yet."""


Resolution: TypeAlias = LocalFolder | Snapshot | DownloadPlan
"""Where a name's files are: a folder, a complete snapshot, or on the hub."""
