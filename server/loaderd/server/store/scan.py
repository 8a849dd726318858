"""What is in the cache.

The layout is the hub library's, but its own scan is not used: it leaves a repository out when one
of its links dangles or a ref has no snapshot, which is when its owner most wants to see it and
delete it, and it reads everything each time. (Nor is its deletion, which asks nobody whether a
file is being written or linked right now.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from loaderd.server.errors import LoaderdError
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder, digest_of_blob
from loaderd.server.store.inventory import FileState, Inventory, Stocktaker
from loaderd.server.store.resolve import check_snapshot

_LAST_SECOND = datetime(9999, 12, 31, tzinfo=UTC).timestamp()

_log = logging.getLogger(__name__)

AllowPickle = Callable[[str], bool]
"""Whether the operator allows weights in pickles for a repository."""


@dataclass(frozen=True)
class SnapshotInfo:
    """One revision of one repository on disk.

    Attributes:
        repo_id: `org/name`.
        commit: 40 hex digits.
        refs: Branches and tags that point to it in the cache.
        size_bytes: Bytes of its files, those that it shares with other snapshots included.
        unique_bytes: Bytes that are freed when it alone is deleted.
        file_count: Number of its files.
        complete: Whether loading finds all that it needs.
        modified_at: When one of its files was last added.
        last_used_at: When it was last used: as the daemon remembers, or one of its files was
            read, as far as the file system keeps count.
        path: Its folder.
        contents: What is freed when no snapshot has a file any more, in bytes by the file's
            path. Nothing for what other repositories may share.
    """

    repo_id: str
    commit: str
    refs: tuple[str, ...]
    size_bytes: int
    unique_bytes: int
    file_count: int
    complete: bool
    modified_at: datetime
    last_used_at: datetime
    path: Path
    contents: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Orphan:
    """A file that belongs to no snapshot: unfinished, or its snapshots are gone.

    Attributes:
        repo_id: Its repository.
        path: The file, in the repository's `blobs`.
        size_bytes: What deleting it frees.
        lock: Held by whoever is writing or linking it.
    """

    repo_id: str
    path: Path
    size_bytes: int
    lock: Path


@dataclass(frozen=True)
class CacheContents:
    """All that a cache holds of models.

    Attributes:
        snapshots: By repository name, then the most recently changed first.
        total_bytes: The disk space that they take; files that several share count once.
        orphans: What belongs to no snapshot.
    """

    snapshots: tuple[SnapshotInfo, ...]
    total_bytes: int
    orphans: tuple[Orphan, ...] = ()

    @property
    def orphan_bytes(self) -> int:
        """The disk space that the orphans take."""
        return sum(orphan.size_bytes for orphan in self.orphans)


class CacheScanner:
    """Lists a cache again and again; what did not change is not looked into again.

    Threads may share it.

    Args:
        cache_dir: The cache; one that does not exist is empty.
        allow_pickle: Repositories whose weights may be pickles; None: none.
    """

    def __init__(self, cache_dir: Path, allow_pickle: AllowPickle | None = None) -> None:
        self._cache_dir = cache_dir
        self._allow_pickle = allow_pickle
        self._repos: dict[str, _KnownRepo] = {}
        self._lock = threading.Lock()
        self._last: tuple[list[_Listing], CacheContents] = ([], CacheContents((), 0))

    def scan(self) -> CacheContents:
        """Lists the cache as it is now."""
        with self._lock:
            known, self._repos = self._repos, {}
            listings = []
            for repo in RepoFolder.all(self._cache_dir):
                each = known.get(repo.repo_id) or _KnownRepo(repo, self._allow_pickle)
                try:
                    listing, settled = each.list()
                except Exception as error:  # others put it there: it must not hide the rest
                    _log.warning("%s is left out: %r", repo.repo_id, error)
                    continue
                listings.append(listing)
                if settled:
                    self._repos[repo.repo_id] = each
            if [*map(id, listings)] != [*map(id, self._last[0])]:
                self._last = (listings, _contents(listings))
            return self._last[1]


def describe(
    repo: RepoFolder, commit: str, allow_pickle: AllowPickle | None = None
) -> SnapshotInfo:
    """One snapshot of a cache.

    Raises:
        FileNotFoundError: There is none.
    """
    inventory = Stocktaker(repo).take()
    if commit not in inventory.snapshots:
        raise FileNotFoundError(repo.snapshot(commit))
    return _Describer(repo, inventory).describe(commit, _is_complete(repo, commit, allow_pickle))


@dataclass(frozen=True)
class _Listing:
    """One repository in a listing; `sizes` has the bytes of all snapshots' files by inode."""

    snapshots: tuple[SnapshotInfo, ...]
    sizes: Mapping[tuple[int, int], int]
    orphans: tuple[Orphan, ...]


class _KnownRepo:
    """A repository, and what was found out about it."""

    def __init__(self, repo: RepoFolder, allow_pickle: AllowPickle | None) -> None:
        self._repo = repo
        self._allow_pickle = allow_pickle
        self._stocktaker = Stocktaker(repo)
        self._inventory: Inventory | None = None
        self._listing = _Listing((), {}, ())
        self._checked: dict[str, tuple[object, bool]] = {}

    def list(self) -> tuple[_Listing, bool]:
        """The repository as it is now, and whether the next change will be noticed."""
        now_ns = time.time_ns()
        inventory = self._stocktaker.take()
        if inventory == self._inventory:
            return self._listing, True
        self._checked = {commit: self._check(inventory, commit) for commit in inventory.snapshots}
        describer = _Describer(self._repo, inventory)
        snapshots = [
            describer.describe(commit, complete) for commit, (_, complete) in self._checked.items()
        ]
        sizes = [_sizes(inventory.files(commit)) for commit in inventory.snapshots]
        self._inventory = inventory
        self._listing = _Listing(
            snapshots=tuple(snapshots),
            sizes={inode: size for each in sizes for inode, size in each.items()},
            orphans=tuple(_orphans(self._repo, inventory)),
        )
        return self._listing, inventory.is_settled(now_ns)

    def _check(self, inventory: Inventory, commit: str) -> tuple[object, bool]:
        version = inventory.version(commit)
        known = self._checked.get(commit)
        if known is not None and known[0] == version:
            return known
        return version, _is_complete(self._repo, commit, self._allow_pickle)


class _Describer:
    """Describes the snapshots of one repository."""

    def __init__(self, repo: RepoFolder, inventory: Inventory) -> None:
        self._repo = repo
        self._inventory = inventory
        self._refs = repo.refs()
        self._used = records.last_used(repo)
        self._users = Counter(
            name for folder in inventory.snapshots.values() for name in set(folder.links)
        )

    def describe(self, commit: str, complete: bool) -> SnapshotInfo:
        folder = self._inventory.snapshots[commit]
        files = self._inventory.files(commit)
        path = self._repo.snapshot(commit)
        dates = files or [folder.state]
        used = _date(max(file.accessed for file in dates))
        blobs = {name: _freed(self._inventory, name) for name in folder.links}
        own = {
            path: state.size
            for path, state in folder.others.items()
            if state is not None
            and state.is_file
            and state.links == 1
            and not Path(path).is_symlink()
        }
        unique = sum(size for name, size in blobs.items() if self._users[name] == 1)
        return SnapshotInfo(
            repo_id=self._repo.repo_id,
            commit=commit,
            refs=tuple(self._refs.get(commit, ())),
            size_bytes=sum(_sizes(files).values()),
            unique_bytes=unique + sum(own.values()),
            file_count=len(files),
            complete=complete,
            modified_at=_date(max(file.modified for file in dates)),
            last_used_at=max(used, self._used.get(commit, used)),
            path=path,
            contents={f"{self._repo.blobs}/{name}": size for name, size in blobs.items()} | own,
        )


def _is_complete(repo: RepoFolder, commit: str, allow_pickle: AllowPickle | None) -> bool:
    allowed = allow_pickle is not None and allow_pickle(repo.repo_id)
    try:
        check_snapshot(repo, commit, allow_pickle=allowed)
    except (LoaderdError, OSError):  # such as one that is being deleted
        return False
    return True


def _contents(listings: Iterable[_Listing]) -> CacheContents:
    snapshots = [info for listing in listings for info in listing.snapshots]
    snapshots.sort(key=lambda info: (info.repo_id, -info.modified_at.timestamp()))
    sizes: dict[tuple[int, int], int] = {}
    for listing in listings:
        sizes |= listing.sizes
    orphans = tuple(orphan for listing in listings for orphan in listing.orphans)
    return CacheContents(tuple(snapshots), sum(sizes.values()), orphans)


def _orphans(repo: RepoFolder, inventory: Inventory) -> Iterable[Orphan]:
    if not inventory.whole:
        return
    linked = {name for folder in inventory.snapshots.values() for name in folder.links}
    for name in sorted(inventory.blobs.keys() - linked):
        digest = digest_of_blob(name)
        if digest is not None:
            size = _freed(inventory, name)
            yield Orphan(repo.repo_id, repo.blobs / name, size, repo.lock(digest))


def _freed(inventory: Inventory, name: str) -> int:
    """What the disk gets back when a blob goes: nothing if the content has other names.

    Nor when it stays, because nobody knows who else needs it.
    """
    state = inventory.blobs.get(name)
    if state is None or state.links > 1 or name in inventory.shared or not inventory.whole:
        return 0
    return state.size


def _date(seconds: float) -> datetime:
    """A file's date; anybody may set it to one that no calendar has."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC)


def _sizes(files: Iterable[FileState]) -> dict[tuple[int, int], int]:
    """Bytes by inode: several links, and several snapshots, may share one blob."""
    return {(file.device, file.inode): file.size for file in files}
