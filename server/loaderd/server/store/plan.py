"""What a download is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loaderd.server.store.cache import TreeEntry


@dataclass(frozen=True)
class PlannedFile:
    """One file that a download brings.

    Attributes:
        path: Its path in the repository.
        size_bytes: Its size.
        digest: What its content hashes to, which names its blob: sha256, or git's blob sha1.
        cached: Whether the cache has it already.
    """

    path: str
    size_bytes: int
    digest: str
    cached: bool


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch.

    Attributes:
        repo_id: `org/name`.
        revision: The branch, tag or commit that was asked for.
        commit: What the hub says it is now: 40 hex digits.
        files: Every file that loading needs.
        tree: The hub's whole listing of the commit, to keep beside the snapshot.
    """

    repo_id: str
    revision: str
    commit: str
    files: tuple[PlannedFile, ...]
    tree: Mapping[str, TreeEntry] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the files that the cache lacks."""
        return sum(file.size_bytes for file in self.files if not file.cached)


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        downloaded_bytes: Bytes on disk, those that the cache had before included.
        total_bytes: Bytes of all files.
        completed_files: Files that are on disk.
        total_files: All files.
        bytes_per_second: Mean rate of this download so far; 0 before the first byte.
    """

    downloaded_bytes: int = 0
    total_bytes: int = 0
    completed_files: int = 0
    total_files: int = 0
    bytes_per_second: float = 0.0
