"""Where the Hugging Face cache keeps things.

The layout is that of the hub library, which shares the cache with us:
`models--org--name/{blobs,refs,snapshots/<commit>,trees/<commit>.json}`, with lock files in
`.locks/` at the cache's root, and in `blobs/` there what several repositories share.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import CacheNotWritableError, InvalidNameError
from loaderd.server.store.names import HubName, is_commit
from loaderd.server.store.reading import read_small

TREE_FORMAT_VERSION = 1

NOT_WRITABLE = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
})  # fmt: skip
"""Modes, owners, disks without room or locks; files where folders should be, and the reverse."""

_FOLDER_PREFIX = "models--"
_SHARED_MARKER = ".huggingface-shared-blobs"
_COMMIT_BEGIN = re.compile(r"[0-9a-f]{7,39}")
# `<digest>`, or `<digest>.<8 hex>.incomplete`, of which older releases leave the 8 hex out.
_BLOB = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})((\.[0-9a-f]{8})?\.incomplete)?")
# A listing has about 200 bytes a file.
_LONGEST_TREE = 64 << 20
_LONGEST_REF = 4096
_TEMPORARY = re.compile(r".*\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class TreeEntry:
    """What the hub's listing of a commit says of one file.

    Attributes:
        size: Bytes of the file itself, never of a pointer to it.
        blob_id: The git object: the file's sha1, or that of its LFS pointer.
        lfs_sha256: The file's sha256 when it is kept in LFS.
    """

    size: int
    blob_id: str
    lfs_sha256: str | None = None

    @property
    def digest(self) -> str:
        """The name of the file's blob: what its content hashes to."""
        return self.lfs_sha256 or self.blob_id


@dataclass(frozen=True)
class RepoFolder:
    """One repository's folder in a cache."""

    cache_dir: Path
    repo_id: str

    @staticmethod
    def all(cache_dir: Path) -> Iterator[RepoFolder]:
        """The model repositories of a cache, in no order; none when there is no cache.

        Raises:
            PermissionError: The cache is not ours to read.
        """
        if not cache_dir.is_dir():
            return
        for path in cache_dir.iterdir():
            repo = RepoFolder._named(path.name, cache_dir)
            try:
                is_folder = path.is_dir()
            except PermissionError:
                continue  # a link to what is not ours
            if repo is not None and is_folder:
                yield repo

    @staticmethod
    def holding(path: Path, cache_dir: Path) -> RepoFolder | None:
        """The repository whose folder has a path in it; None if none has.

        Args:
            path: A real path.
            cache_dir: The cache.
        """
        cache = Path(os.path.realpath(cache_dir))
        if not path.is_relative_to(cache) or path == cache:
            return None
        return RepoFolder._named(path.relative_to(cache).parts[0], cache_dir)

    @staticmethod
    def _named(folder: str, cache_dir: Path) -> RepoFolder | None:
        """The repository of a folder's name; None if the hub library makes no such folder."""
        if not folder.startswith(_FOLDER_PREFIX):
            return None
        repo_id = folder.removeprefix(_FOLDER_PREFIX).replace("--", "/")
        try:
            HubName(repo_id)
        except InvalidNameError:
            return None
        return RepoFolder(cache_dir, repo_id)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.cache_dir / (_FOLDER_PREFIX + self.repo_id.replace("/", "--"))

    @property
    def locks(self) -> Path:
        """Where the hub library locks this repository's blobs while it downloads them."""
        return self.cache_dir / ".locks" / self.path.name

    @property
    def blobs(self) -> Path:
        """Where the files' contents are, each named by its hash."""
        return self.path / "blobs"

    def lock(self, digest: str) -> Path:
        """What whoever writes, links or deletes a blob holds meanwhile."""
        return self.locks / f"{digest}.lock"

    def pin(self, commit: str) -> Path:
        """What every process that uses a snapshot holds meanwhile."""
        return self.locks / f"snapshot-{commit}.lock"

    def snapshot(self, commit: str) -> Path:
        """The folder with a commit's files: links into `blobs`."""
        return self.path / "snapshots" / commit

    def has_snapshot(self, commit: str) -> bool:
        """Whether a commit has a snapshot, whole or not. A link to a folder is none."""
        path = self.snapshot(commit)
        return path.is_dir() and not path.is_symlink()

    def commits(self) -> list[str]:
        """The commits that have a snapshot, whole or not."""
        folder = self.path / "snapshots"
        if not folder.is_dir():
            return []
        return [entry.name for entry in folder.iterdir() if is_commit(entry.name)]

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision was when it was last fetched; None if it never was."""
        if is_commit(revision):
            return revision
        try:
            data = read_small(self.path / "refs" / revision, _LONGEST_REF)
        except PermissionError:
            raise
        except OSError:  # there is none, or it is something else
            return None
        commit = data.decode("ascii", "replace").strip()
        return commit if is_commit(commit) else None

    def cached_commit(self, revision: str) -> str | None:
        """The commit of the snapshot that a branch, a tag, or the begin of a commit names.

        None when there is no such snapshot, or several commits begin so.
        """
        commit = self.commit_of(revision) or self.begun_commit(revision)
        return commit if commit in self.commits() else None

    def begun_commit(self, revision: str) -> str | None:
        """The commit of the only snapshot whose commit begins so, if no branch or tag is so called.

        At least seven hex digits; None when there is no such snapshot, or there are several.
        """
        if not _COMMIT_BEGIN.fullmatch(revision) or self.commit_of(revision) is not None:
            return None
        begun = [commit for commit in self.commits() if commit.startswith(revision)]
        return begun[0] if len(begun) == 1 else None

    def refs(self) -> dict[str, list[str]]:
        """The names of branches and tags by their commit, sorted."""
        root = self.path / "refs"
        names: dict[str, list[str]] = {}
        unread = [root] if root.is_dir() else []
        while unread:
            for path in unread.pop().iterdir():
                name = path.relative_to(root).as_posix()
                if path.is_dir() and not path.is_symlink():
                    unread.append(path)
                elif name.isprintable() and not _TEMPORARY.fullmatch(name) and not is_commit(name):
                    commit = self.commit_of(name)
                    if commit is not None:
                        names.setdefault(commit, []).append(name)
        return {commit: sorted(each) for commit, each in names.items()}

    def write_ref(self, revision: str, commit: str) -> None:
        """Notes which commit a revision is now."""
        if is_commit(revision) or self.commit_of(revision) == commit:
            return
        ref = self.path / "refs" / revision
        # Git has no branch `a` beside a branch `a/b`: what stands in the way is a branch that was.
        for folder in ref.relative_to(self.path / "refs").parents[:-1]:
            if (self.path / "refs" / folder).is_file():
                (self.path / "refs" / folder).unlink()
        if ref.is_dir():
            shutil.rmtree(ref)
        replace_text(ref, commit)

    def tree(self, commit: str) -> Path:
        """The file with the hub's listing of a commit."""
        return self.path / "trees" / f"{commit}.json"

    def read_tree(self, commit: str) -> dict[str, TreeEntry] | None:
        """The hub's listing of a commit; None when the cache has none that is readable."""
        try:
            data = json.loads(read_small(self.tree(commit), _LONGEST_TREE))
            if data["format_version"] != TREE_FORMAT_VERSION:
                return None
            return {name: _tree_entry(entry) for name, entry in data["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write_tree(self, commit: str, tree: Mapping[str, TreeEntry]) -> None:
        """Keeps the hub's listing of a commit, in the hub library's own format."""
        files = {}
        for name in sorted(tree):
            entry = tree[name]
            files[name] = {"size": entry.size, "blob_id": entry.blob_id}
            if entry.lfs_sha256 is not None:
                files[name] |= {"lfs_sha256": entry.lfs_sha256, "lfs_size": entry.size}
        data = {"format_version": TREE_FORMAT_VERSION, "files": files}
        replace_text(self.tree(commit), json.dumps(data, indent=1))

    def holds(self, real: Path) -> bool:
        """Whether a real path is where a link of this repository's snapshots may point.

        That is its own `blobs`, its own snapshots (where links are not supported the files
        themselves are there), or the store of blobs that the cache's repositories share.
        """
        homes = [self.blobs, self.path / "snapshots"]
        shared = self.cache_dir / "blobs"
        if (shared / _SHARED_MARKER).is_file():
            homes.append(shared)
        return any(real.is_relative_to(os.path.realpath(home)) for home in homes)


def default_cache_dir() -> Path:
    """The cache that the hub library uses in this environment, as an absolute path."""
    home = _expand(
        os.environ.get(
            "HF_HOME",
            str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")),
        )
    )
    legacy = os.environ.get("HUGGINGFACE_HUB_CACHE", str(Path(home, "hub")))
    return Path(_expand(os.environ.get("HF_HUB_CACHE", legacy))).absolute()


def digest_of_blob(name: str) -> str | None:
    """The digest of the content that a file in `blobs` is, or is a part of; None for others."""
    match = _BLOB.fullmatch(name)
    return match and match[1]


@contextmanager
def writing(cache_dir: Path) -> Iterator[None]:
    """While the cache is written to: says by a typed error that it cannot be.

    Raises:
        CacheNotWritableError: Its owner, mode or disk forbids it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        place = Path(error.filename or cache_dir)
        if place.is_relative_to(cache_dir):
            place = place.relative_to(cache_dir.parent)
        raise CacheNotWritableError(f"{place}: {error.strerror}") from error


def _expand(path: str) -> str:
    return os.path.expandvars(Path(path).expanduser())


def _tree_entry(data: dict[str, object]) -> TreeEntry:
    sha256, blob_id = data.get("lfs_sha256"), data["blob_id"]
    size = data["size"] if sha256 is None else data["lfs_size"]
    if not isinstance(size, int) or not isinstance(blob_id, str):
        raise TypeError("a tree's entry has a size and a blob_id")
    return TreeEntry(size, blob_id, None if sha256 is None else str(sha256))


def replace_text(path: Path, text: str) -> None:
    """Writes a file such that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
