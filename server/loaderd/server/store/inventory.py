"""What a repository's folder holds at one moment, by names, sizes and dates alone.

Taking an inventory opens no file and costs about one system call a file, so that it can be taken
for every listing. Whatever is dear to find out holds as long as the inventory stays the same.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.names import is_commit

# The kernel's clock for files ticks up to every 10 ms: what changed within the last tick may
# change again and look the same.
_SETTLED_NS = 100_000_000


class FileState(NamedTuple):
    """One file, or one folder.

    Attributes:
        device: With `inode`, what it is whatever its name.
        inode: See `device`.
        size: In bytes.
        changed_ns: The time of its last change, of content or anything else; nobody can set it.
        modified: When its content changed, in seconds.
        accessed: When it was read, as far as the file system keeps count, in seconds.
        links: How many names it has.
        mode: Its type and permissions.
    """

    device: int
    inode: int
    size: int
    changed_ns: int
    modified: float
    accessed: float
    links: int
    mode: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def version(self) -> tuple[int, int, int, int]:
        """Stays the same as long as it is the same file and only read."""
        return self[:4]


_with_use = attrgetter(
    "st_dev", "st_ino", "st_size", "st_ctime_ns", "st_mtime", "st_atime", "st_nlink", "st_mode"
)
# Folders, and what is no file of a model, are read by listing them.
_without_use = attrgetter(
    "st_dev", "st_ino", "st_size", "st_ctime_ns", "st_mtime", "st_mtime", "st_nlink", "st_mode"
)

States = Mapping[str, FileState]

_made = FileState._make
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """A snapshot's folder.

    Attributes:
        state: The folder itself.
        inner: The folders in it, by path.
        links: The blobs that its links lead to, one for each link; missing ones included.
        others: Its other files, by path: those that are no links, and what links to elsewhere
            lead to, if anything.
    """

    state: FileState
    inner: States
    links: tuple[str, ...]
    others: Mapping[str, FileState | None]

    @property
    def leads_out(self) -> bool:
        """Whether one of its links leads to a folder. Such links are not followed."""
        return any(state and stat.S_ISDIR(state.mode) for state in self.others.values())

    def is_as(self, state: FileState) -> bool:
        """Whether nothing in it changed; `state` is what the folder itself is now."""
        return (
            self.state == state
            and all(_state(Path(path), _without_use) == each for path, each in self.inner.items())
            and all(_state(Path(path), _with_use) == each for path, each in self.others.items())
        )


@dataclass(frozen=True)
class Inventory:
    """What a repository's folder holds.

    Attributes:
        snapshots: By commit.
        whole: Whether that is all. It is not when one cannot be read, or has links to folders: then
            it cannot be told which blobs nobody needs.
        blobs: By name; of links into the store that repositories share, what they lead to.
        shared: The blobs that are such links.
        refs: The files below `refs`, by path.
        trees: The hub's listings, by name.
        record: What the daemon remembers.
    """

    snapshots: Mapping[str, Folder]
    whole: bool
    blobs: States
    shared: frozenset[str]
    refs: States
    trees: States
    record: FileState | None

    def files(self, commit: str) -> list[FileState]:
        """The regular files that a snapshot's entries lead to; one for each entry."""
        return [state for state in self._states(commit) if state is not None and state.is_file]

    def version(self, commit: str) -> object:
        """Stays the same as long as a snapshot's files and its listing do."""
        tree = self.trees.get(f"{commit}.json")
        folder = self.snapshots[commit]
        states = [tree, folder.state, *folder.inner.values(), *self._states(commit)]
        return [state and state.version for state in states]

    def is_settled(self, now_ns: int) -> bool:
        """Whether the next change will show; it may not when the last one was just now."""
        states = [*self.blobs.values(), *self.refs.values(), *self.trees.values(), self.record]
        for folder in self.snapshots.values():
            states += [folder.state, *folder.inner.values(), *folder.others.values()]
        latest = max((state.changed_ns for state in states if state is not None), default=0)
        return latest < now_ns - _SETTLED_NS

    def _states(self, commit: str) -> list[FileState | None]:
        """What a snapshot's entries lead to, if anything."""
        folder = self.snapshots[commit]
        return [*map(self.blobs.get, folder.links), *folder.others.values()]


class Stocktaker:
    """Takes one repository's inventory again and again.

    The links of a snapshot are read only when its folders changed.

    Args:
        repo: The repository.
    """

    def __init__(self, repo: RepoFolder) -> None:
        self._repo_id = repo.repo_id
        self._blobs = str(repo.blobs)
        self._root = str(repo.path)
        self._record = records.path_of(repo)
        self._folders: Mapping[str, Folder] = {}

    def take(self) -> Inventory:
        """What is there now.

        Raises:
            OSError: The folder is not ours to read.
        """
        # The links before what they lead to: a download adds them in the other order.
        snapshots, whole = self._snapshots(f"{self._root}/snapshots")
        self._folders = snapshots
        blobs, shared = _blobs(self._blobs)
        return Inventory(
            snapshots=snapshots,
            whole=whole and not any(folder.leads_out for folder in snapshots.values()),
            blobs=blobs,
            shared=frozenset(shared),
            refs=dict(_below(f"{self._root}/refs")),
            trees=_entries(f"{self._root}/trees"),
            record=_state(self._record, _without_use),
        )

    def _snapshots(self, root: str) -> tuple[dict[str, Folder], bool]:
        """The snapshots by commit, and whether all of them could be read."""
        snapshots, whole = {}, True
        for commit, state in _entries(root).items():
            known = self._folders.get(commit)
            if known is None and not is_commit(commit):
                continue
            try:
                if not stat.S_ISDIR(state.mode):
                    raise NotADirectoryError(errno.ENOTDIR, "is a link, or no folder")
                if known is None or not known.is_as(state):
                    known = self._read(f"{root}/{commit}", state)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError as error:
                _log.warning("snapshot %s of %s is left out: %s", commit, self._repo_id, error)
                whole = False
            else:
                snapshots[commit] = known
        return snapshots, whole

    def _read(self, path: str, state: FileState) -> Folder:
        inner: dict[str, FileState] = {}
        links: list[str] = []
        others: dict[str, FileState | None] = {}
        unread = [path]
        while unread:
            with os.scandir(unread.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        inner[entry.path] = _made(_without_use(entry.stat(follow_symlinks=False)))
                        unread.append(entry.path)
                    elif (name := self._blob_of(entry)) is not None:
                        links.append(name)
                    else:
                        others[entry.path] = _state(Path(entry.path), _with_use)
        return Folder(state, inner, tuple(links), others)

    def _blob_of(self, entry: os.DirEntry[str]) -> str | None:
        """The name of the blob that an entry is a link to, if it is one."""
        if not entry.is_symlink():
            return None
        path = Path(entry.path)
        target = Path(os.path.normpath(path.parent / path.readlink()))
        return target.name if str(target.parent) == self._blobs else None


def _blobs(path: str) -> tuple[dict[str, FileState], list[str]]:
    """The blobs by name, and which of them are links."""
    states, shared = {}, []
    for entry in _scan(path):
        try:
            states[entry.name] = _made(_with_use(entry.stat()))
        except OSError:  # deleted meanwhile, or a link that leads nowhere
            continue
        if entry.is_symlink():
            shared.append(entry.name)
    return states, shared


def _below(path: str) -> Iterator[tuple[str, FileState]]:
    unread = [path]
    while unread:
        folder = unread.pop()
        for name, state in _entries(folder).items():
            yield f"{folder}/{name}", state
            if stat.S_ISDIR(state.mode):
                unread.append(f"{folder}/{name}")


def _entries(path: str) -> dict[str, FileState]:
    states = {}
    for entry in _scan(path):
        try:
            states[entry.name] = _made(_without_use(entry.stat(follow_symlinks=False)))
        except FileNotFoundError:  # deleted meanwhile
            continue
    return states


def _scan(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _state(path: Path, fields: attrgetter[Any]) -> FileState | None:
    try:
        return _made(fields(path.stat()))
    except OSError:  # not there, or a link that leads nowhere
        return None
