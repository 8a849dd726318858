"""Reads a cached snapshot and compares each file with its hash.

What a file should be is what the hub's listing of the commit says of it, and where the cache has
no listing, the name of the blob that the file links to. Nothing here asks the hub.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from loaderd.server.errors import (
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
    SnapshotNotFoundError,
)
from loaderd.server.store.cache import RepoFolder, TreeEntry
from loaderd.server.store.digests import digest_of_file, is_digest, stamp_of
from loaderd.server.store.names import HubName
from loaderd.server.store.resolve import check_snapshot, needed_files

_INTERVAL_S = 0.1
_MOST_THREADS = 4


class ProblemKind(StrEnum):
    """What can be wrong with a file; see `loaderd.v1.ProblemKind`."""

    MISSING = "missing"
    SIZE = "size"
    CONTENT = "content"
    LINK = "link"


@dataclass(frozen=True)
class FileProblem:
    """A file of a snapshot that is not as it should be.

    Attributes:
        path: Its path in the repository.
        kind: What is wrong.
        expected: What should be there: a hash, a size, or words.
        found: What is there.
    """

    path: str
    kind: ProblemKind
    expected: str
    found: str


@dataclass(frozen=True)
class VerifyProgress:
    """How far a verification is.

    Attributes:
        verified_bytes: Bytes that were read.
        total_bytes: Bytes of all files that are read.
        verified_files: Files that were read.
        total_files: All files that are read.
        bytes_per_second: Mean rate so far.
    """

    verified_bytes: int
    total_bytes: int
    verified_files: int
    total_files: int
    bytes_per_second: float


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        problems: The files that are not as they should be, by path.
        verified_files: Files whose content is what its hash says.
        verified_bytes: Bytes of those.
        unverifiable_files: Files without a known hash: others put them there.
        stamps: Of the files that were read and are right, by their digest; see `records`.
        wrong: The digests that files should have and do not.
    """

    problems: tuple[FileProblem, ...]
    verified_files: int
    verified_bytes: int
    unverifiable_files: tuple[str, ...]
    stamps: Mapping[str, str] = field(default_factory=dict, compare=False)
    wrong: frozenset[str] = field(default=frozenset(), compare=False)


OnUpdate = Callable[[VerifyProgress | FileProblem], None]


class VerificationStoppedError(Exception):
    """The verification was told to stop."""


@dataclass(frozen=True)
class _File:
    """A file to be read, of the right size as far as that is known."""

    path: str
    real: Path
    size: int
    digest: str
    stamp: str


class Verification:
    """One reading of a cached snapshot.

    Args:
        repo: The repository.
        commit: The snapshot's commit.
        allow_pickle: The operator allows weights in pickles for this repository.
        paths: The files to look at; None: all that the snapshot has, and what loading needs.
        known: Stamps of contents that need not be read again, by their digest.
    """

    def __init__(
        self,
        repo: RepoFolder,
        commit: str,
        *,
        allow_pickle: bool = False,
        paths: Collection[str] | None = None,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._repo = repo
        self._commit = commit
        self._allow_pickle = allow_pickle
        self._only = paths
        self._known = known
        self._folder = repo.snapshot(commit)
        self._problems: dict[str, FileProblem] = {}
        self._unverifiable: list[str] = []

    def run(self, on_update: OnUpdate, stopped: threading.Event) -> VerifyReport:
        """Reads all files; blocks meanwhile. Once only.

        Args:
            on_update: Called in this thread: with each problem as it is found, and with the
                progress at most ten times a second.
            stopped: Set by another thread to end this one.

        Raises:
            SnapshotNotFoundError: There is no such snapshot.
            VerificationStoppedError: `stopped` was set.
        """
        files: list[_File] = []
        for path in self._paths():
            match self._inspect(path):
                case _File() as file:
                    files.append(file)
                case FileProblem() as found:
                    self._report(found, on_update)
                case None:
                    self._unverifiable.append(_printable(path))
        known = [file for file in files if self._known.get(file.digest) == file.stamp]
        unread = [file for file in files if self._known.get(file.digest) != file.stamp]
        right = self._read(unread, on_update, stopped)
        good = known + right
        if problem := self._loading_problem():
            self._report(problem, on_update)
        return VerifyReport(
            problems=tuple(self._problems[path] for path in sorted(self._problems)),
            verified_files=len(good),
            verified_bytes=sum(file.size for file in good),
            unverifiable_files=tuple(self._unverifiable),
            stamps={file.digest: file.stamp for file in right if _stamp(file.real) == file.stamp},
            wrong=frozenset(file.digest for file in set(unread).difference(right)),
        )

    @cached_property
    def _tree(self) -> dict[str, TreeEntry]:
        return self._repo.read_tree(self._commit) or {}

    def _paths(self) -> list[str]:
        """What the snapshot has, and what loading needs besides; or what was asked for."""
        if self._only is not None:
            return sorted(self._only)
        try:
            present = set(_names(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            name = HubName(self._repo.repo_id, self._commit)
            raise SnapshotNotFoundError(str(name)) from None
        try:
            needed = needed_files(self._repo, self._commit, allow_pickle=self._allow_pickle)
        except (SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError, OSError):
            needed = []  # its index cannot be read, which comes up further down
        return sorted(present.union(needed))

    def _inspect(self, path: str) -> _File | FileProblem | None:
        """A file that is to be read, what is wrong with it, or None if it has no known hash."""
        pointer = self._folder / path
        real = Path(os.path.realpath(pointer))
        if not self._repo.holds(real):
            return FileProblem(
                path, ProblemKind.LINK, "a link to the repository's own blobs", "another place"
            )
        if not real.is_file():
            return FileProblem(path, ProblemKind.MISSING, "a file", "nothing")
        size = real.stat().st_size
        entry = self._tree.get(path)
        if entry is None or not is_digest(entry.digest):
            blob = pointer.readlink().name if pointer.is_symlink() else ""
            return _File(path, real, size, blob, _stamp(real)) if is_digest(blob) else None
        if size != entry.size:
            return FileProblem(path, ProblemKind.SIZE, f"{entry.size} bytes", f"{size} bytes")
        return _File(path, real, size, entry.digest, _stamp(real))

    def _read(
        self, files: list[_File], on_update: OnUpdate, stopped: threading.Event
    ) -> list[_File]:
        """Hashes the files, several at a time; returns those that are right."""
        meter = _Meter(files)
        good: list[_File] = []
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "verify") as pool:
            # The largest first, so that none of them runs alone at the end.
            pending: dict[Future[FileProblem | None], _File] = {
                pool.submit(_compare, file, meter, stopped): file
                for file in sorted(files, key=lambda file: -file.size)
            }
            try:
                while pending:
                    done, _ = wait(pending, timeout=_INTERVAL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        file = pending.pop(future)
                        problem = future.result()
                        meter.files += 1
                        if problem is None:
                            good.append(file)
                        else:
                            self._report(problem, on_update)
                    if meter.is_due():
                        on_update(meter.progress())
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        if stopped.is_set():
            raise VerificationStoppedError
        on_update(meter.progress())
        return good

    def _loading_problem(self) -> FileProblem | None:
        """What loading would stumble over although the hashes are right, such as a bad upload."""
        try:
            check_snapshot(self._repo, self._commit, allow_pickle=self._allow_pickle)
        except SnapshotIncompleteError as error:
            return FileProblem(error.file, ProblemKind.MISSING, "a file", "nothing")
        except SnapshotCorruptError as error:
            return FileProblem(error.file, ProblemKind.CONTENT, error.expected, error.found)
        except (ModelUnsupportedError, OSError):
            pass  # whole all the same; or not readable, which came up when it was hashed
        return None

    def _report(self, problem: FileProblem, on_update: OnUpdate) -> None:
        """Tells the first problem of each file."""
        problem = replace(problem, path=_printable(problem.path))
        if problem.path not in self._problems:
            self._problems[problem.path] = problem
            on_update(problem)


class _Meter:
    """Counts what is read. Threads add bytes; everything else is for one thread."""

    def __init__(self, files: list[_File]) -> None:
        self.files = 0
        self._total_files = len(files)
        self._total_bytes = sum(file.size for file in files)
        self._bytes = 0
        self._lock = threading.Lock()
        self._begin = self._told = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def is_due(self) -> bool:
        return time.monotonic() - self._told >= _INTERVAL_S

    def progress(self) -> VerifyProgress:
        self._told = time.monotonic()
        elapsed = self._told - self._begin
        rate = self._bytes / elapsed if elapsed else 0.0
        return VerifyProgress(self._bytes, self._total_bytes, self.files, self._total_files, rate)


def _compare(file: _File, meter: _Meter, stopped: threading.Event) -> FileProblem | None:
    """What is wrong with a file's content, if anything."""

    def on_bytes(count: int) -> None:
        if stopped.is_set():
            raise VerificationStoppedError
        meter.add(count)

    on_bytes(0)
    try:
        found = digest_of_file(file.real, file.digest, on_bytes)
    except FileNotFoundError:  # deleted meanwhile
        return FileProblem(file.path, ProblemKind.MISSING, "a file", "nothing")
    except OSError as error:
        return _unreadable(file.path, error)
    if found == file.digest:
        return None
    return FileProblem(file.path, ProblemKind.CONTENT, file.digest, found)


def _stamp(path: Path) -> str:
    try:
        return stamp_of(path)
    except FileNotFoundError:  # deleted meanwhile, which comes up when it is read
        return ""


def _unreadable(path: str, error: OSError) -> FileProblem:
    return FileProblem(path, ProblemKind.CONTENT, "a file", f"not readable: {error.strerror}")


def _printable(path: str) -> str:
    """The path without bytes that are no text, which no message can carry."""
    return path.encode(errors="replace").decode()


def _names(folder: Path) -> Iterator[str]:
    """All that a snapshot's folder has, recursively: files, links, whatever they lead to."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _names(Path(entry)))
        else:
            yield entry.name
