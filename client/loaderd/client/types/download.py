"""Downloads: what they would fetch, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from loaderd.client.types.enums import SkipReason


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a `DownloadPlan`."""

    path: str
    """Path in the repository."""
    size_bytes: int
    """Its size."""
    cached: bool
    """Whether the cache has it already."""
    partial_bytes: int
    """Bytes that an interrupted download left of it, from which the next goes on."""


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """One file of a repository that a download leaves out."""

    path: str
    """Path in the repository."""
    size_bytes: int
    """Its size."""
    reason: SkipReason
    """Why it is left out."""


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
    """Bytes that are to be fetched: those of the files that are not in the cache, without what an
    interrupted download left of them."""
    skipped: tuple[SkippedFile, ...]
    """Files that loading does not need, the largest first; at most 1000 of them."""
    skipped_count: int
    """Number of all those files."""
    skipped_bytes: int
    """Bytes of all those files."""


@dataclass(frozen=True, kw_only=True)
class FileProgress:
    """How far one file of a download is."""

    path: str
    """Path in the repository."""
    downloaded_bytes: int
    """Bytes that are on disk."""
    size_bytes: int
    """Its size."""


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
    """Rate of the last ten seconds; 0 while nothing comes."""
    files: tuple[FileProgress, ...]
    """The files that are being fetched now, in the plan's order."""
    remaining: timedelta | None
    """The time left at that rate; None while it cannot be told."""
    resumed_bytes: int
    """Bytes that an interrupted download had left, and that were not fetched again."""
    refetched_bytes: int
    """Bytes that had come and are fetched again: the hub did not go on in mid-file, or what had
    come was not the file's content."""

    @property
    def fraction(self) -> float | None:
        """The part that is done, 0 to 1; None while the total is not known."""
        return self.downloaded_bytes / self.total_bytes if self.total_bytes else None


@dataclass(frozen=True, kw_only=True)
class Download:
    """One download under way."""

    model: str
    """The name that it was asked for by."""
    progress: DownloadProgress
    """How far it is."""
    waiters: int
    """How many calls wait for it."""


@dataclass(frozen=True, kw_only=True)
class CancelledDownload:
    """What `cancel_download` stopped."""

    waiters: int
    """How many calls waited for it; 0: there was no such download."""
    kept_bytes: int
    """Bytes of its unfinished files, which are kept for the next download."""
