"""What a download is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from loaderd.server.store.cache import TreeEntry

_LONGEST_TOLD = 365 * 86400.0


@dataclass(frozen=True)
class PlannedFile:
    """One file that a download brings.

    Attributes:
        path: Its path in the repository.
        size_bytes: Its size.
        digest: What its content hashes to, which names its blob: sha256, or git's blob sha1.
        cached: Whether the cache has it already.
        partial_bytes: What an interrupted download left of it.
    """

    path: str
    size_bytes: int
    digest: str
    cached: bool
    partial_bytes: int = 0


class SkipReason(StrEnum):
    """Why a download leaves a file out; see `loaderd.v1.SkipReason`."""

    PICKLE = "pickle"
    OTHER_FORMAT = "other_format"
    OTHER_COPY = "other_copy"
    CODE = "code"
    NOT_NEEDED = "not_needed"


@dataclass(frozen=True)
class SkippedFile:
    """One file of a repository that a download leaves out."""

    path: str
    size_bytes: int
    reason: SkipReason


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch.

    Attributes:
        repo_id: `org/name`.
        revision: The branch, tag or commit that was asked for.
        commit: What the hub says it is now: 40 hex digits.
        files: Every file that loading needs.
        skipped: Other files of the repository, the largest first.
        skipped_count: How many there are of those in all.
        skipped_bytes: Bytes of all of those.
        tree: The hub's whole listing of the commit, to keep beside the snapshot.
    """

    repo_id: str
    revision: str
    commit: str
    files: tuple[PlannedFile, ...]
    skipped: tuple[SkippedFile, ...] = ()
    skipped_count: int = 0
    skipped_bytes: int = 0
    tree: Mapping[str, TreeEntry] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are to be fetched."""
        missing = (file for file in self.files if not file.cached)
        return sum(file.size_bytes - file.partial_bytes for file in missing)


@dataclass(frozen=True)
class FileProgress:
    """How far one file of a download is."""

    path: str
    downloaded_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        downloaded_bytes: Bytes on disk, those that the cache had before included.
        total_bytes: Bytes of all files.
        completed_files: Files that are on disk.
        total_files: All files.
        bytes_per_second: Rate of the last ten seconds; 0 while nothing comes.
        files: Those that are being fetched now, in the plan's order.
        resumed_bytes: What an interrupted download had left and was not fetched again.
        refetched_bytes: What had come and is fetched again.
    """

    downloaded_bytes: int = 0
    total_bytes: int = 0
    completed_files: int = 0
    total_files: int = 0
    bytes_per_second: float = 0.0
    files: tuple[FileProgress, ...] = ()
    resumed_bytes: int = 0
    refetched_bytes: int = 0

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at that rate; None while they cannot be told, or would be years."""
        if not self.total_bytes or not self.bytes_per_second:
            return None
        seconds = max(0, self.total_bytes - self.downloaded_bytes) / self.bytes_per_second
        return seconds if seconds < _LONGEST_TOLD else None


@dataclass(frozen=True)
class Downloaded:
    """A snapshot that is there.

    Attributes:
        path: Its folder.
        stamps: Of the contents that the download hashed, by their digest; see `digests.stamp_of`.
            What the cache had before is not among them unless there was a doubt.
    """

    path: Path
    stamps: Mapping[str, str]


@dataclass(frozen=True)
class DownloadState:
    """Where a download stands.

    Attributes:
        plan: What it fetches; None while the hub has not said.
        progress: How far it is.
    """

    plan: DownloadPlan | None = None
    progress: DownloadProgress = DownloadProgress()
