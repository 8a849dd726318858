"""Who uses what in the cache: this daemon, other daemons, other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loaderd.server.store.cache import RepoFolder, digest_of_blob
from loaderd.server.store.locks import is_locked
from loaderd.server.store.plan import DownloadPlan, DownloadProgress
from loaderd.server.store.scan import SnapshotInfo

DOWNLOAD = "download"
"""The holder of the snapshots that a download may share files with."""

ANOTHER_PROCESS = "another process"
"""The holder of what others use: another daemon, or a program that downloads."""


@dataclass(eq=False)
class Arrival:
    """A download on its way into the cache.

    Attributes:
        repo: Its repository.
        missing_bytes: What is still to come; 0 while that is not known.
    """

    repo: RepoFolder
    missing_bytes: int = 0
    _plan: DownloadPlan | None = None
    _contents: frozenset[str] = field(default=frozenset(), repr=False)

    def planned(self, plan: DownloadPlan) -> None:
        """Notes what it brings."""
        self._plan = plan
        self._contents = frozenset(f"{self.repo.blobs}/{file.digest}" for file in plan.files)

    def moved(self, progress: DownloadProgress) -> None:
        """Notes how far it is."""
        self.missing_bytes = max(0, progress.total_bytes - progress.downloaded_bytes)

    def uses(self, snapshot: SnapshotInfo) -> bool:
        """Whether it needs a snapshot's files; of those of its repository, while it has no plan."""
        if snapshot.repo_id != self.repo.repo_id:
            return False
        if self._plan is None or self._plan.commit == snapshot.commit:
            return True
        return not self._contents.isdisjoint(snapshot.contents)

    def writes(self, blob: Path) -> bool:
        """Whether it brings a content."""
        return str(blob) in self._contents


class Usage:
    """Who uses what, at one moment.

    Args:
        cache_dir: The cache.
        pins: The holders of pinned snapshots, by repository and commit.
        arrivals: The downloads under way.
    """

    def __init__(
        self,
        cache_dir: Path,
        pins: Mapping[tuple[str, str], tuple[str, ...]],
        arrivals: Sequence[Arrival],
    ) -> None:
        self._cache_dir = cache_dir
        self._pins = pins
        self._arrivals = arrivals
        self._busy_elsewhere: dict[str, bool] = {}

    def holders(self, snapshot: SnapshotInfo) -> tuple[str, ...]:
        """Who uses a snapshot in this daemon."""
        holders = self._pins.get((snapshot.repo_id, snapshot.commit), ())
        downloads = any(arrival.uses(snapshot) for arrival in self._arrivals)
        return (*holders, DOWNLOAD) if downloads else holders

    def all_holders(self, snapshot: SnapshotInfo) -> tuple[str, ...]:
        """Who uses a snapshot anywhere, as far as locks tell. Looks at the disk."""
        holders = self.holders(snapshot)
        if holders:  # of those the lock is ours
            return holders
        repo = RepoFolder(self._cache_dir, snapshot.repo_id)
        if is_locked(repo.pin(snapshot.commit), otherwise=False) or self._is_busy_elsewhere(repo):
            return (ANOTHER_PROCESS,)
        return ()

    def is_busy(self, repo_id: str) -> bool:
        """Whether this daemon downloads a repository."""
        return any(arrival.repo.repo_id == repo_id for arrival in self._arrivals)

    def _is_busy_elsewhere(self, repo: RepoFolder) -> bool:
        """Whether another process brings, links or deletes a repository's contents."""
        busy = self._busy_elsewhere.get(repo.repo_id)
        if busy is None:
            busy = any(
                is_locked(lock, otherwise=False)
                for lock in repo.locks.glob("*.lock")
                if digest_of_blob(lock.stem) and not self._is_ours(repo.blobs / lock.stem)
            )
            self._busy_elsewhere[repo.repo_id] = busy
        return busy

    def _is_ours(self, blob: Path) -> bool:
        return any(arrival.writes(blob) for arrival in self._arrivals)
