"""What is in the cache.

The hub library's own scan leaves a repository out when one of its links dangles or a ref has no
snapshot, which is when its owner most wants to see it, so this one looks for itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loaderd.server.errors import LoaderdError
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.resolve import check_snapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotInfo:
    """One revision of one repository on disk.

    Attributes:
        repo_id: `org/name`.
        commit: 40 hex digits.
        refs: Branches and tags that point to it in the cache.
        size_bytes: Bytes of its files, those that it shares with other snapshots included.
        file_count: Number of its files.
        complete: Whether loading finds all that it needs.
        modified_at: When one of its files was last added.
        last_used_at: When one of its files was last read, as far as the file system keeps count.
        path: Its folder.
    """

    repo_id: str
    commit: str
    refs: tuple[str, ...]
    size_bytes: int
    file_count: int
    complete: bool
    modified_at: datetime
    last_used_at: datetime
    path: Path


@dataclass(frozen=True)
class CacheContents:
    """All snapshots of models in a cache.

    Attributes:
        snapshots: By repository name, then the most recently changed first.
        total_bytes: The disk space that they take; files that several share count once.
    """

    snapshots: tuple[SnapshotInfo, ...]
    total_bytes: int


def scan(cache_dir: Path) -> CacheContents:
    """Lists a cache; one that does not exist is empty."""
    snapshots: list[SnapshotInfo] = []
    blobs: dict[tuple[int, int], int] = {}
    for repo in RepoFolder.all(cache_dir):
        for commit in repo.commits():
            try:
                files = _files(repo.snapshot(commit))
                snapshots.append(_info(repo, commit, files))
            except OSError as error:  # deleted meanwhile, or not ours to read
                _log.warning("snapshot %s of %s is left out: %s", commit, repo.repo_id, error)
            else:
                blobs |= _sizes(files)
    snapshots.sort(key=lambda info: (info.repo_id, -info.modified_at.timestamp()))
    return CacheContents(tuple(snapshots), sum(blobs.values()))


def describe(repo: RepoFolder, commit: str) -> SnapshotInfo:
    """One snapshot of a cache."""
    return _info(repo, commit, _files(repo.snapshot(commit)))


def _info(repo: RepoFolder, commit: str, files: list[os.stat_result]) -> SnapshotInfo:
    path = repo.snapshot(commit)
    dates = files or [path.stat()]
    return SnapshotInfo(
        repo_id=repo.repo_id,
        commit=commit,
        refs=tuple(repo.refs().get(commit, ())),
        size_bytes=sum(_sizes(files).values()),
        file_count=len(files),
        complete=_is_complete(repo, commit),
        modified_at=_time(max(file.st_mtime for file in dates)),
        last_used_at=_time(max(file.st_atime for file in dates)),
        path=path,
    )


def _is_complete(repo: RepoFolder, commit: str) -> bool:
    try:
        check_snapshot(repo, commit)
    except LoaderdError:
        return False
    return True


def _files(snapshot: Path) -> list[os.stat_result]:
    """What the snapshot's links lead to; those that lead nowhere are no files."""
    return list(_walk(snapshot))


def _walk(folder: Path) -> Iterator[os.stat_result]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path).stat()


def _sizes(files: list[os.stat_result]) -> dict[tuple[int, int], int]:
    """Bytes by inode: several links, and several snapshots, may share one blob."""
    return {(file.st_dev, file.st_ino): file.st_size for file in files}


def _time(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)
