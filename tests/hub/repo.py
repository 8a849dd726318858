"""Repositories of the local hub: files, commits, branches and tags."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypeAlias

CHUNK_BYTES = 1 << 20
# Like the real hub, which keeps small text in git and anything large or binary beside it.
LFS_THRESHOLD_BYTES = 10 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")

Content: TypeAlias = bytes | Path


class Access(Enum):
    """Who may read a repository."""

    PUBLIC = "public"
    GATED = "gated"  # everybody sees its metadata; its files need the token
    PRIVATE = "private"  # it does not exist for who lacks the token


@dataclass(frozen=True)
class HubFile:
    """One file of a commit. Its content stays where it is: in memory or on the disk."""

    path: str
    content: Content
    size: int
    oid: str  # the git object: the file's blob, or for LFS that of its pointer
    sha256: str | None  # for LFS only

    @staticmethod
    def of(path: str, content: Content) -> HubFile:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        blob = hashlib.sha1(b"blob %d\0" % size)
        sha256 = hashlib.sha256()
        for chunk in _read(content, 0, size):
            blob.update(chunk)
            sha256.update(chunk)
        if size < LFS_THRESHOLD_BYTES and not path.endswith(LFS_SUFFIXES):
            return HubFile(path, content, size, blob.hexdigest(), None)
        pointer = _lfs_pointer(sha256.hexdigest(), size)
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return HubFile(path, content, size, oid, sha256.hexdigest())

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(_lfs_pointer(self.etag, self.size))

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in chunks."""
        return _read(self.content, start, stop)


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, HubFile]


class HubRepo:
    """A repository: commits, and the branches and tags that name them. Thread-safe."""

    def __init__(
        self, repo_id: str, *, access: Access = Access.PUBLIC, token: str | None = None
    ) -> None:
        if (access is Access.PUBLIC) != (token is None):
            raise ValueError("a gated or private repository has a token, a public one has none")
        self.id = repo_id
        self.access = access
        self.token = token
        self._commits: dict[str, Commit] = {}
        self._refs: dict[str, str] = {}
        self._lock = threading.Lock()

    @staticmethod
    def from_folder(
        repo_id: str,
        folder: Path,
        *,
        access: Access = Access.PUBLIC,
        token: str | None = None,
    ) -> HubRepo:
        """A repository whose branch `main` holds the files below `folder`."""
        repo = HubRepo(repo_id, access=access, token=token)
        repo.commit(files_below(folder))
        return repo

    def commit(
        self, files: Mapping[str, Content | None], *, branch: str = "main", parent: str = ""
    ) -> str:
        """Puts a commit on top of `branch` and returns its sha, which its content determines.

        Args:
            files: Content by path, laid over the parent's files; None takes a file away.
            branch: The branch to move, or to make.
            parent: The revision to start from instead of the branch's head.
        """
        changed = {p: HubFile.of(p, c) for p, c in files.items() if c is not None}
        with self._lock:
            base = self._find(parent or branch)
            if parent and base is None:
                raise KeyError(f"{self.id} has no revision {parent!r}")
            merged = {**(base.files if base else {}), **changed}
            tree = {p: merged[p] for p in sorted(merged) if files.get(p, b"") is not None}
            text = "".join(f"{p}\0{f.oid}\0" for p, f in tree.items())
            text += base.sha if base else ""
            sha = hashlib.sha1(text.encode()).hexdigest()
            self._commits[sha] = Commit(sha, MappingProxyType(tree))
            self._refs[branch] = sha
            return sha

    def point(self, name: str, revision: str) -> None:
        """Makes or moves the branch or tag `name`; going back in history is a moved branch."""
        with self._lock:
            commit = self._find(revision)
            if commit is None:
                raise KeyError(f"{self.id} has no revision {revision!r}")
            self._refs[name] = commit.sha

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a sha names."""
        with self._lock:
            return self._find(revision)

    def admits(self, token: str | None) -> bool:
        return self.token is None or self.token == token

    def _find(self, revision: str) -> Commit | None:
        return self._commits.get(self._refs.get(revision, revision))


def files_below(folder: Path) -> dict[str, Path]:
    """The files below `folder` by their path from it, with `/`.

    Raises:
        FileNotFoundError: There is no such folder, or no file in it.
    """
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    if not files:
        raise FileNotFoundError(f"no files below {folder}")
    return files


def _read(content: Content, start: int, stop: int) -> Iterator[bytes]:
    file: BinaryIO = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    with file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(CHUNK_BYTES, stop - start))
            if not chunk:
                raise EOFError("a file that the hub serves became shorter")
            start += len(chunk)
            yield chunk


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )
