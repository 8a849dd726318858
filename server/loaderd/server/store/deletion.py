"""Deletes snapshots: first a plan, with every byte counted, then the deed.

The hub library's own deletion is not used: it does not see repositories with a dangling link, and
asks nobody whether a file is being written or linked right now.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder, digest_of_blob, writing
from loaderd.server.store.locks import is_locked, try_lock
from loaderd.server.store.scan import CacheContents, Orphan, SnapshotInfo

InUse = Callable[[SnapshotInfo], bool]
"""Whether somebody uses a snapshot."""

_TRASH = re.compile(r"trash-([0-9a-f]{40})-[0-9a-f]{8}")
_LOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class Deletion:
    """What goes.

    Attributes:
        snapshots: The snapshots, as they were.
        orphans: Files that belong to no snapshot.
        freed_bytes: What the disk gets back.
        kept: Snapshots that were meant too and stay because they are in use.
        remaining_bytes: What the cache takes afterwards, orphans included.
    """

    snapshots: tuple[SnapshotInfo, ...]
    orphans: tuple[Orphan, ...]
    freed_bytes: int
    kept: tuple[SnapshotInfo, ...]
    remaining_bytes: int


@dataclass(frozen=True)
class PrunePolicy:
    """What is not worth keeping: all that meets any of the conditions.

    Attributes:
        orphans: Files that belong to no snapshot.
        unreferenced: Snapshots that no branch or tag points to.
        unused_for: Snapshots that were not used for so long.
        max_bytes: As much as it takes for the cache to be no larger: orphans first, then the
            snapshots that were not used for longest.
    """

    orphans: bool = False
    unreferenced: bool = False
    unused_for: timedelta | None = None
    max_bytes: int | None = None

    def names(self, snapshot: SnapshotInfo, now: datetime) -> bool:
        """Whether a snapshot goes whatever the cache's size."""
        if self.unreferenced and not snapshot.refs:
            return True
        return self.unused_for is not None and now - snapshot.last_used_at >= self.unused_for


def plan_deletion(
    contents: CacheContents, chosen: Iterable[SnapshotInfo], in_use: InUse
) -> Deletion:
    """Plans the deletion of chosen snapshots, but for those in use.

    A repository that loses its last snapshot loses its orphans too.
    """
    plan = _Plan(contents, busy=lambda _: False)
    kept = []
    for info in chosen:
        if in_use(info):
            kept.append(info)
        else:
            plan.take(info)
    return plan.finished(kept)


def plan_prune(
    contents: CacheContents,
    policy: PrunePolicy,
    in_use: InUse,
    now: datetime,
    busy: Callable[[str], bool],
) -> Deletion:
    """Plans the deletion of what a policy names, but for what is in use.

    Args:
        contents: The cache.
        policy: The policy.
        in_use: Whether somebody uses a snapshot.
        now: The time.
        busy: Whether a repository is being downloaded: its orphans stay.
    """
    plan = _Plan(contents, busy)
    used, free = list[SnapshotInfo](), list[SnapshotInfo]()
    for info in sorted(contents.snapshots, key=lambda info: info.last_used_at):
        (used if in_use(info) else free).append(info)
    kept = [info for info in used if policy.names(info, now)]
    for info in free:
        if policy.names(info, now):
            plan.take(info)
    bound = policy.max_bytes
    if policy.orphans or (bound is not None and plan.remaining_bytes > bound):
        plan.take_orphans()
    if bound is not None:
        for info in free:
            if plan.remaining_bytes <= bound:
                break
            plan.take(info)
        if plan.remaining_bytes > bound:
            kept = used
    return plan.finished(kept)


def execute(deletion: Deletion, cache_dir: Path) -> None:
    """Deletes what was planned, as far as it is still there.

    Every snapshot vanishes whole and at once. A file that somebody writes or links just now stays,
    whatever the plan said.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """
    infos, orphans = defaultdict(list), defaultdict(list)
    for info in deletion.snapshots:
        infos[info.repo_id].append(info)
    for orphan in deletion.orphans:
        orphans[orphan.repo_id].append(orphan.path.name)
    with writing(cache_dir):
        for repo_id in sorted({*infos, *orphans}):
            remover = _Remover(RepoFolder(cache_dir, repo_id))
            remover.bury([info.commit for info in infos[repo_id]])
            blobs = {Path(path).name for info in infos[repo_id] for path in info.contents}
            remover.remove([info.commit for info in infos[repo_id]], blobs.union(orphans[repo_id]))


def remove_trash(cache_dir: Path) -> None:
    """Ends deletions that a daemon did not come to the end of.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """
    with writing(cache_dir):
        for repo in RepoFolder.all(cache_dir):
            remover = _Remover(repo)
            if remover.buried():
                remover.remove((), ())


class _Plan:
    """A deletion in the making: counts what is left of a cache while parts are taken from it."""

    def __init__(self, contents: CacheContents, busy: Callable[[str], bool]) -> None:
        self.remaining_bytes = contents.total_bytes + contents.orphan_bytes
        self._contents = contents
        self._busy = busy
        self._users = Counter(path for info in contents.snapshots for path in info.contents)
        self._snapshots_left = Counter(info.repo_id for info in contents.snapshots)
        self._paths: set[Path] = set()

    def take(self, info: SnapshotInfo) -> None:
        """Takes a snapshot, and with its repository's last one what belongs to none."""
        if info.path in self._paths:
            return
        self._paths.add(info.path)
        self._users.subtract(info.contents.keys())
        self.remaining_bytes -= sum(
            size for path, size in info.contents.items() if not self._users[path]
        )
        self._snapshots_left[info.repo_id] -= 1
        if not self._snapshots_left[info.repo_id]:
            self.take_orphans(info.repo_id)

    def take_orphans(self, repo_id: str | None = None) -> None:
        """Takes the files that belong to no snapshot and that nobody writes to."""
        for orphan in self._contents.orphans:
            if orphan.path in self._paths or repo_id not in {None, orphan.repo_id}:
                continue
            if not self._busy(orphan.repo_id) and not is_locked(orphan.lock):
                self._paths.add(orphan.path)
                self.remaining_bytes -= orphan.size_bytes

    def finished(self, kept: Iterable[SnapshotInfo]) -> Deletion:
        """The plan, with what was meant too."""
        before = self._contents.total_bytes + self._contents.orphan_bytes
        return Deletion(
            snapshots=tuple(i for i in self._contents.snapshots if i.path in self._paths),
            orphans=tuple(o for o in self._contents.orphans if o.path in self._paths),
            freed_bytes=before - self.remaining_bytes,
            kept=tuple(kept),
            remaining_bytes=self.remaining_bytes,
        )


class _Remover:
    """Removes parts of one repository. What is gone already is as it should be."""

    def __init__(self, repo: RepoFolder) -> None:
        self._repo = repo

    def bury(self, commits: Iterable[str]) -> None:
        """Takes snapshots out of sight, each in one step."""
        for commit in commits:
            trash = self._repo.path / f"trash-{commit}-{secrets.token_hex(4)}"
            with suppress(FileNotFoundError):
                self._repo.snapshot(commit).rename(trash)

    def buried(self) -> dict[Path, str]:
        """The folders of snapshots that were taken out of sight, and their commits."""
        matches = ((path, _TRASH.fullmatch(path.name)) for path in self._repo.path.glob("trash-*"))
        return {path: match[1] for path, match in matches if match}

    def remove(self, commits: Iterable[str], blobs: Iterable[str]) -> None:
        """Removes what is buried, and what belongs to it or is named, unless it is needed."""
        buried = self.buried()
        gone = {commit for commit in [*commits, *buried.values()] if not self._has(commit)}
        self._remove_traces(gone)
        self._remove_blobs({*blobs, *(name for path in buried for name in _linked(path))})
        for path in buried:
            _remove(path)
        if not self._remove_if_empty():  # last: on a full disk there is room again
            records.forget(self._repo, gone)

    def _has(self, commit: str) -> bool:
        return self._repo.snapshot(commit).exists()

    def _remove_traces(self, commits: Collection[str]) -> None:
        refs = self._repo.refs()
        for commit in commits:
            for name in refs.get(commit, ()):
                (self._repo.path / "refs" / name).unlink(missing_ok=True)
            self._repo.tree(commit).unlink(missing_ok=True)
            _remove(self._repo.path / ".no_exist" / commit)

    def _remove_blobs(self, names: Collection[str]) -> None:
        """Removes files in `blobs` that no snapshot links to and that nobody writes or links."""
        by_lock = defaultdict(list)
        for name in sorted(self._blobs() & set(names)):
            by_lock[self._repo.lock(digest_of_blob(name) or name)].append(name)
        for batch in _batches(by_lock, _LOCKS_AT_ONCE):
            with ExitStack() as locks:
                free = [lock for lock in batch if locks.enter_context(try_lock(lock))]
                linked = set(_linked(self._repo.path / "snapshots"))
                for name in (name for lock in free for name in by_lock[lock]):
                    if name not in linked:
                        (self._repo.blobs / name).unlink(missing_ok=True)

    def _remove_if_empty(self) -> bool:
        """Removes the repository if it has neither a snapshot nor a content any more."""
        if self._repo.commits() or any(map(digest_of_blob, self._blobs())):
            return False
        _remove(self._repo.path)
        return True

    def _blobs(self) -> set[str]:
        try:
            with os.scandir(self._repo.blobs) as entries:
                return {each.name for each in entries if not each.is_dir(follow_symlinks=False)}
        except FileNotFoundError:
            return set()


def _linked(folder: Path) -> Iterator[str]:
    """The names of the blobs that the links below a folder lead to."""
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):  # removed meanwhile
                if path.is_symlink():
                    yield path.readlink().name


def _batches(items: Iterable[Path], size: int) -> Iterator[list[Path]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _remove(path: Path) -> None:
    while path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):  # somebody else removes it too
            shutil.rmtree(path)
    path.unlink(missing_ok=True)
