"""Deletes snapshots: first a plan, with every byte counted, then the deed.

The hub library's own deletion is not used: it does not see repositories with a dangling link, and
asks nobody whether a file is being written or linked right now.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder, digest_of_blob, writing
from loaderd.server.store.locks import is_locked, try_lock
from loaderd.server.store.scan import CacheContents, Orphan, SnapshotInfo

Holders = Callable[[SnapshotInfo], Sequence[str]]
"""Who uses a snapshot."""

Busy = Callable[[str], bool]
"""Whether a repository is being downloaded: what belongs to no snapshot stays."""

_TRASH = re.compile(r"trash-([0-9a-f]{40})-[0-9a-f]{8}")
_LOCKS_AT_ONCE = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deletion:
    """What goes.

    Attributes:
        snapshots: The snapshots, as they were.
        orphans: Files that belong to no snapshot.
        freed_bytes: What the disk gets back.
        kept: Snapshots that were meant too and stay because they are in use.
        holders: Who uses those, by their folders.
        remaining_bytes: What the cache takes afterwards, orphans included.
    """

    snapshots: tuple[SnapshotInfo, ...]
    orphans: tuple[Orphan, ...]
    freed_bytes: int
    kept: tuple[SnapshotInfo, ...]
    holders: Mapping[Path, Sequence[str]]
    remaining_bytes: int


@dataclass(frozen=True)
class PrunePolicy:
    """What is not worth keeping: all that meets any of the conditions.

    Attributes:
        orphans: Files that belong to no snapshot.
        unreferenced: Snapshots that no branch or tag points to.
        unused_for: Snapshots that were not used for so long.
        max_bytes: As much as it takes for the cache to be no larger: orphans first, then the
            snapshots that were not used for longest, but none that frees nothing.
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
    contents: CacheContents, chosen: Iterable[SnapshotInfo], holders: Holders, busy: Busy
) -> Deletion:
    """Plans the deletion of chosen snapshots, but for those in use.

    A repository that loses its last snapshot loses its orphans too.

    Args:
        contents: The cache.
        chosen: The snapshots.
        holders: Who uses a snapshot.
        busy: Whether a repository is being downloaded.
    """
    plan = _Plan(contents, busy)
    kept = {}
    for info in chosen:
        if users := holders(info):
            kept[info.path] = users
        else:
            plan.take(info)
    return plan.finished(kept)


def plan_prune(
    contents: CacheContents,
    policy: PrunePolicy,
    holders: Holders,
    now: datetime,
    busy: Busy,
) -> Deletion:
    """Plans the deletion of what a policy names, but for what is in use.

    Args:
        contents: The cache.
        policy: The policy.
        holders: Who uses a snapshot.
        now: The time.
        busy: Whether a repository is being downloaded.
    """
    plan = _Plan(contents, busy)
    bound = policy.max_bytes
    named = {info.path for info in contents.snapshots if policy.names(info, now)}
    meant = [info for info in contents.snapshots if bound is not None or info.path in named]
    in_use = {info.path: users for info in meant if (users := holders(info))}
    kept = {path: users for path, users in in_use.items() if path in named}
    free = [info for info in meant if info.path not in in_use]
    for info in free:
        if info.path in named:
            plan.take(info)
    if policy.orphans or (bound is not None and plan.remaining_bytes > bound):
        plan.take_orphans()
    if bound is not None:
        free.sort(key=lambda info: info.last_used_at)
        plan.shrink([info for info in free if info.path not in named], bound)
        if plan.remaining_bytes > bound:
            kept = in_use
    return plan.finished(kept)


def execute(deletion: Deletion, cache_dir: Path, busy: Busy) -> None:
    """Deletes what was planned, as far as it is still there.

    Every snapshot vanishes whole and at once. What another process has begun to use since stays,
    whatever the plan said: a snapshot that it has pinned, a file that it writes or links.

    Args:
        deletion: The plan.
        cache_dir: The cache.
        busy: Whether a repository is being downloaded.

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
            remover = _Remover(RepoFolder(cache_dir, repo_id), busy=busy(repo_id))
            remover.bury([info.commit for info in infos[repo_id]])
            blobs = {Path(path).name for info in infos[repo_id] for path in info.contents}
            remover.remove([info.commit for info in infos[repo_id]], blobs.union(orphans[repo_id]))


def remove_trash(repo: RepoFolder) -> None:
    """Ends deletions in a repository that a daemon did not come to the end of.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """
    with writing(repo.cache_dir):
        remover = _Remover(repo, busy=False)
        if remover.buried():
            remover.remove((), ())


class _Plan:
    """A deletion in the making: counts what is left of a cache while parts are taken from it."""

    def __init__(self, contents: CacheContents, busy: Busy) -> None:
        self.remaining_bytes = contents.total_bytes + contents.orphan_bytes
        self._contents = contents
        self._busy = busy
        self._users = Counter(path for info in contents.snapshots for path in info.contents)
        self._snapshots_left = Counter(info.repo_id for info in contents.snapshots)
        self._paths: set[Path] = set()
        self._orphans: dict[str, list[Orphan]] = defaultdict(list)
        for orphan in contents.orphans:
            self._orphans[orphan.repo_id].append(orphan)

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

    def shrink(self, victims: Iterable[SnapshotInfo], bound: int) -> None:
        """Takes snapshots in their order until no more is left than `bound`.

        Of what it took those stay after all that free nothing: others share their files.
        """
        taken = []
        for info in victims:
            if self.remaining_bytes <= bound:
                break
            self.take(info)
            taken.append(info)
        for info in taken:
            if not any(size for path, size in info.contents.items() if not self._users[path]):
                self._paths.remove(info.path)
                self._users.update(info.contents.keys())
                self._snapshots_left[info.repo_id] += 1

    def take_orphans(self, repo_id: str | None = None) -> None:
        """Takes the files that belong to no snapshot and that nobody writes to."""
        for repo in self._orphans if repo_id is None else (repo_id,):
            for orphan in () if self._busy(repo) else self._orphans.get(repo, ()):
                if orphan.path not in self._paths and not is_locked(orphan.lock):
                    self._paths.add(orphan.path)
                    self.remaining_bytes -= orphan.size_bytes

    def finished(self, kept: Mapping[Path, Sequence[str]]) -> Deletion:
        """The plan; `kept` says who uses what was meant too."""
        before = self._contents.total_bytes + self._contents.orphan_bytes
        return Deletion(
            snapshots=tuple(i for i in self._contents.snapshots if i.path in self._paths),
            orphans=tuple(o for o in self._contents.orphans if o.path in self._paths),
            freed_bytes=before - self.remaining_bytes,
            kept=tuple(i for i in self._contents.snapshots if i.path in kept),
            holders=kept,
            remaining_bytes=self.remaining_bytes,
        )


class _Remover:
    """Removes parts of one repository. What is gone already is as it should be."""

    def __init__(self, repo: RepoFolder, *, busy: bool) -> None:
        self._repo = repo
        self._busy = busy

    def bury(self, commits: Iterable[str]) -> None:
        """Takes snapshots out of sight, each in one step, unless somebody uses them by now."""
        for commit in commits:
            trash = self._repo.path / f"trash-{commit}-{secrets.token_hex(4)}"
            with try_lock(self._repo.pin(commit), otherwise=True) as unused:
                if unused:
                    with suppress(FileNotFoundError):
                        self._repo.snapshot(commit).rename(trash)
                else:
                    _log.warning("%s@%s stays: it is used by now", self._repo.repo_id, commit)

    def buried(self) -> dict[Path, str]:
        """The folders of snapshots that were taken out of sight, and their commits."""
        matches = ((path, _TRASH.fullmatch(path.name)) for path in self._repo.path.glob("trash-*"))
        return {path: match[1] for path, match in matches if match}

    def remove(self, commits: Iterable[str], blobs: Iterable[str]) -> None:
        """Removes what is buried, and what belongs to it or is named, unless it is needed."""
        buried = self.buried()
        gone = {commit for commit in [*commits, *buried.values()] if not self._has(commit)}
        self._remove_traces(gone)
        names = set(blobs)
        with suppress(OSError):  # what it needed alone is listed from now on as of no snapshot
            names.update(name for path in buried for name in _linked(path))
        left = self._remove_blobs(names)
        for path in buried:
            _remove(path)
        before = set[str]()
        while left != before:  # on a full disk there is room for their locks only now
            before, left = left, self._remove_blobs(left)
        if left:
            _log.warning("%d contents of %s stay, locked by others", len(left), self._repo.repo_id)
        if self._busy or not self._remove_if_empty():
            try:
                records.forget(self._repo, gone)
            except (CacheNotWritableError, OSError) as error:  # what matters is done
                _log.warning("%s: %s", self._repo.repo_id, error)

    def _has(self, commit: str) -> bool:
        return self._repo.snapshot(commit).exists()

    def _remove_traces(self, commits: Collection[str]) -> None:
        refs = self._repo.refs()
        for commit in commits:
            for name in refs.get(commit, ()):
                (self._repo.path / "refs" / name).unlink(missing_ok=True)
            self._repo.tree(commit).unlink(missing_ok=True)
            _remove(self._repo.path / ".no_exist" / commit)

    def _remove_blobs(self, names: Collection[str]) -> set[str]:
        """Removes files in `blobs` that no snapshot links to and that nobody writes or links.

        Returns:
            Those whose locks were not to be had.
        """
        left = set()
        by_lock = defaultdict(list)
        for name in sorted(self._blobs() & set(names)):
            by_lock[self._repo.lock(digest_of_blob(name) or name)].append(name)
        for batch in _batches(by_lock, _LOCKS_AT_ONCE):
            with ExitStack() as locks:
                free = [lock for lock in batch if locks.enter_context(try_lock(lock))]
                try:
                    linked = set(_linked(self._repo.path / "snapshots"))
                except OSError as error:  # who knows what belongs to that
                    _log.warning("no content of %s is deleted: %s", self._repo.repo_id, error)
                    return set()
                for lock in batch:
                    for name in set(by_lock[lock]) - linked:
                        if lock in free:
                            (self._repo.blobs / name).unlink(missing_ok=True)
                        else:
                            left.add(name)
        return left

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
    """The names of the blobs that the links below a folder lead to.

    Raises:
        OSError: It cannot be read whole, or has links to folders, which are not followed.
    """
    for root, folders, files in os.walk(folder, onerror=_raise_unless_gone):
        for path in (Path(root, name) for name in folders):
            if path.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "is a link to a folder", str(path))
        for path in (Path(root, name) for name in files):
            with suppress(FileNotFoundError):  # removed meanwhile
                if path.is_symlink():
                    yield path.readlink().name


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _batches(items: Iterable[Path], size: int) -> Iterator[list[Path]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _remove(path: Path) -> None:
    while path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):  # somebody else removes it too
            shutil.rmtree(path)
    path.unlink(missing_ok=True)
