"""Where a name's files are. Asks the file system only, never the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import (
    InvalidNameError,
    LoaderdError,
    ModelNotFoundError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.cache import RepoFolder, TreeEntry
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.reading import open_unnoticed
from loaderd.server.store.selection import (
    CHAT_TEMPLATE_FOLDER,
    CONFIG,
    SINGLE_WEIGHTS,
    find_weights,
    has_weights,
    is_gguf,
    is_index,
    select,
)
from loaderd.server.store.weights import check_file, read_shards

MAX_JSON_BYTES = 64 << 20

# What loading always reads when the repository has it. Everything else that a listing names may
# be missing: transformers, which shares the cache, fetches only what it needs.
_ESSENTIAL = frozenset({CONFIG, "tokenizer.json", "tokenizer_config.json"})


@dataclass(frozen=True)
class LocalFolder:
    """A local folder that holds a whole model, or a GGUF file that is one.

    Attributes:
        path: Its real path, symbolic links resolved.
        size_bytes: Bytes of the files that loading needs.
    """

    path: Path
    size_bytes: int


@dataclass(frozen=True)
class CachedSnapshot:
    """A snapshot in the cache that holds a whole model.

    Attributes:
        repo_id: `org/name`.
        revision: The branch, tag or commit that was asked for.
        commit: What it is: 40 hex digits.
        path: The snapshot's folder.
        size_bytes: Bytes of the files that loading needs.
        stale: The hub was asked what the revision is now, and did not answer.
    """

    repo_id: str
    revision: str
    commit: str
    path: Path
    size_bytes: int
    stale: bool = False


@dataclass(frozen=True)
class NotCached:
    """The cache has no whole snapshot of the name.

    Attributes:
        name: The name.
        commit: The commit of the snapshot that is there but not usable, if any.
        problem: What is wrong with it. Whoever may ask the hub fetches again; whoever may not
            raises this.
    """

    name: HubName
    commit: str | None = None
    problem: LoaderdError | None = None


Resolution = LocalFolder | CachedSnapshot | NotCached

# Raises when a needed file's real path is where it must not be.
_Confine = Callable[[str, Path], None]


def allows_pickle(allowed: Collection[str], name: HubName | LocalName) -> bool:
    """Whether the operator allows weights in pickles for a name.

    Args:
        allowed: Repository ids, and real paths of local folders.
        name: The name.
    """
    if isinstance(name, LocalName):
        return os.path.realpath(name.path) in allowed
    return name.repo_id in allowed


def resolve(
    name: HubName | LocalName,
    *,
    cache_dir: Path,
    local_roots: Sequence[Path] | None,
    allow_pickle: bool = False,
) -> Resolution:
    """Finds a name's files and checks that they are whole.

    Sizes, links, the weights' headers and their index are checked, hashes are not: this reads
    a few kilobytes.

    Args:
        name: What to look for.
        cache_dir: The Hugging Face cache; it need not exist.
        local_roots: The folders below which local models may be; None: anywhere.
        allow_pickle: The operator allows weights in pickles for this name.

    Raises:
        ModelNotFoundError: There is no such local folder.
        InvalidNameError: The local folder, or a file of it, is outside `local_roots`.
        SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError: The local folder
            is not a model that can be loaded.
    """
    if isinstance(name, LocalName):
        return _resolve_local(name, local_roots, allow_pickle)
    return _resolve_cached(name, cache_dir, allow_pickle)


def check_snapshot(repo: RepoFolder, commit: str, *, allow_pickle: bool = False) -> int:
    """The bytes of the files that loading a cached snapshot needs.

    Raises:
        SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError: It cannot be loaded.
    """
    return _snapshot_files(repo, commit, allow_pickle).check()


def needed_files(repo: RepoFolder, commit: str, *, allow_pickle: bool = False) -> list[str]:
    """The files that loading a cached snapshot needs, whether they are there or not.

    Raises:
        SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError: Its weights' index
            cannot be read, or it has no weights.
    """
    return _snapshot_files(repo, commit, allow_pickle).needed()


def _snapshot_files(repo: RepoFolder, commit: str, allow_pickle: bool) -> _ModelFiles:
    model = repo.repo_id

    def confine(file: str, real: Path) -> None:
        if not repo.holds(real):
            raise SnapshotCorruptError(
                model, file, "a link to the repository's own blobs", "a link to another place"
            )

    folder = repo.snapshot(commit)
    tree = repo.read_tree(commit)
    if tree is None and not has_weights(_names(folder)):
        # Somebody fetched a part of it, such as the tokenizer: the hub may well have weights.
        raise SnapshotIncompleteError(model, SINGLE_WEIGHTS)
    return _ModelFiles(folder, model, confine, tree, allow_pickle)


def _resolve_local(
    name: LocalName, roots: Sequence[Path] | None, allow_pickle: bool
) -> LocalFolder:
    model = str(name)
    real_roots = None if roots is None else [Path(os.path.realpath(root)) for root in roots]

    def allowed(real: Path) -> bool:
        return real_roots is None or any(real.is_relative_to(root) for root in real_roots)

    def confine(file: str, real: Path) -> None:
        if not allowed(real):
            raise InvalidNameError(
                "model",
                f"{file!r} in {model!r} links to a place outside the folders that the daemon "
                "may read; copy it there, or add that place with --allow-local",
            )

    folder = Path(os.path.realpath(name.path))
    if not allowed(folder):
        raise InvalidNameError(
            "model",
            f"{model!r} is outside the folders that the daemon may read; "
            f"start it with --allow-local {model}",
        )
    try:
        if folder.is_file():
            if not is_gguf(folder.name):
                problem = f"{model!r} is a file; give the folder that holds it"
                raise InvalidNameError("model", problem)
            file = _ModelFiles(folder.parent, model, confine, None, allow_pickle, folder.name)
            return LocalFolder(folder, file.check())
        if not folder.is_dir():
            raise ModelNotFoundError(model)
        files = _ModelFiles(folder, model, confine, None, allow_pickle)
        return LocalFolder(folder, files.check())
    except FileNotFoundError:  # deleted meanwhile
        raise ModelNotFoundError(model) from None
    except PermissionError:
        problem = f"the user that the daemon runs as may not read {model!r}"
        raise InvalidNameError("model", problem) from None
    except OSError as error:  # such as a name that is too long
        raise InvalidNameError("model", f"{model!r} cannot be read: {error.strerror}") from None


def _resolve_cached(
    name: HubName, cache_dir: Path, allow_pickle: bool
) -> CachedSnapshot | NotCached:
    repo = RepoFolder(cache_dir, name.repo_id)
    try:
        commit = repo.commit_of(name.revision)
        if commit is None or not repo.has_snapshot(commit):
            return NotCached(name)
        size = check_snapshot(repo, commit, allow_pickle=allow_pickle)
    except (SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError) as problem:
        return NotCached(name, commit, problem)
    except OSError:  # deleted meanwhile, or not ours to read
        return NotCached(name)
    return CachedSnapshot(name.repo_id, name.revision, commit, repo.snapshot(commit), size)


@dataclass(frozen=True)
class _ModelFiles:
    """The files of a model in a folder.

    Attributes:
        folder: The folder.
        model: The model, for errors.
        confine: Refuses real paths out of bounds.
        tree: The hub's listing, if the cache has it.
        allow_pickle: Take pickles when there are no safetensors.
        weights: The file that holds the weights, if it is known.
    """

    folder: Path
    model: str
    confine: _Confine
    tree: Mapping[str, TreeEntry] | None
    allow_pickle: bool
    weights: str | None = None

    def check(self) -> int:
        """Checks every file that loading needs; returns their bytes."""
        needed = self.needed()
        if CONFIG in needed or not any(map(is_gguf, needed)):  # those have it inside
            _check_config(self._read(CONFIG), self.model)
        return sum(map(self._check, needed))

    def needed(self) -> list[str]:
        """Every file that loading needs."""
        present = _names(self.folder)
        # What is in the folder counts even if no listing has it: loading would take it.
        names = present if self.tree is None else present | self.tree.keys()
        weights = self.weights or find_weights(names, self.model, allow_pickle=self.allow_pickle)
        shards: Collection[str] = ()
        if is_index(weights):
            shards = read_shards(self._read(weights), weights, self.model)
        return select(present | (_ESSENTIAL & set(names)), {weights, *shards})

    def _check(self, file: str) -> int:
        real = self._real_path(file)
        size = real.stat().st_size
        entry = None if self.tree is None else self.tree.get(file)
        if entry is not None and size != entry.size:
            raise SnapshotCorruptError(self.model, file, f"{entry.size} bytes", f"{size} bytes")
        check_file(real, file, self.model)
        return size

    def _read(self, file: str) -> bytes:
        with open_unnoticed(self._real_path(file)) as content:
            data = content.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise SnapshotCorruptError(self.model, file, f"at most {MAX_JSON_BYTES} bytes", "more")
        return data

    def _real_path(self, file: str) -> Path:
        real = Path(os.path.realpath(self.folder / file))
        self.confine(file, real)
        if not real.is_file():
            raise SnapshotIncompleteError(self.model, file)
        return real


def _names(folder: Path) -> set[str]:
    """The files at a folder's root and its chat templates, dangling links included."""
    templates = folder / CHAT_TEMPLATE_FOLDER
    names = {path.name for path in folder.iterdir() if not path.is_dir()}
    if templates.is_dir():
        names.update(f"{CHAT_TEMPLATE_FOLDER}/{path.name}" for path in templates.iterdir())
    return names


def _check_config(data: bytes, model: str) -> None:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise SnapshotCorruptError(model, CONFIG, "a JSON object", "something else")
