"""Where a name's files are. Asks the file system only, never the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
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
    has_weights,
    select,
    weights_index,
)
from loaderd.server.store.weights import check_weights, read_shards

MAX_JSON_BYTES = 64 << 20

# What loading always reads when the repository has it. Everything else that a listing names may
# be missing: transformers, which shares the cache, fetches only what it needs.
_ESSENTIAL = frozenset({CONFIG, "tokenizer.json", "tokenizer_config.json"})


@dataclass(frozen=True)
class LocalFolder:
    """A local folder that holds a whole model.

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


def resolve(
    name: HubName | LocalName, *, cache_dir: Path, local_roots: Sequence[Path] | None
) -> Resolution:
    """Finds a name's files and checks that they are whole.

    Sizes, links, the weights' headers and their index are checked, hashes are not: this reads
    a few kilobytes.

    Args:
        name: What to look for.
        cache_dir: The Hugging Face cache; it need not exist.
        local_roots: The folders below which local models may be; None: anywhere.

    Raises:
        ModelNotFoundError: There is no such local folder.
        InvalidNameError: The local folder, or a file of it, is outside `local_roots`.
        SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError: The local folder
            is not a model that can be loaded.
    """
    if isinstance(name, LocalName):
        return _resolve_local(name, local_roots)
    return _resolve_cached(name, cache_dir)


def check_snapshot(repo: RepoFolder, commit: str) -> int:
    """The bytes of the files that loading a cached snapshot needs.

    Raises:
        SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError: It cannot be loaded.
    """
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
    return _check_folder(folder, model, confine, tree)


def _resolve_local(name: LocalName, roots: Sequence[Path] | None) -> LocalFolder:
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
            raise InvalidNameError("model", f"{model!r} is a file; give the folder that holds it")
        if not folder.is_dir():
            raise ModelNotFoundError(model)
        return LocalFolder(folder, _check_folder(folder, model, confine, None))
    except FileNotFoundError:  # deleted meanwhile
        raise ModelNotFoundError(model) from None
    except PermissionError:
        problem = f"the user that the daemon runs as may not read {model!r}"
        raise InvalidNameError("model", problem) from None
    except OSError as error:  # such as a name that is too long
        raise InvalidNameError("model", f"{model!r} cannot be read: {error.strerror}") from None


def _resolve_cached(name: HubName, cache_dir: Path) -> CachedSnapshot | NotCached:
    repo = RepoFolder(cache_dir, name.repo_id)
    try:
        commit = repo.commit_of(name.revision)
        if commit is None or not repo.snapshot(commit).is_dir():
            return NotCached(name)
        size = check_snapshot(repo, commit)
    except (SnapshotIncompleteError, SnapshotCorruptError, ModelUnsupportedError) as problem:
        return NotCached(name, commit, problem)
    except OSError:  # deleted meanwhile, or not ours to read
        return NotCached(name)
    return CachedSnapshot(name.repo_id, name.revision, commit, repo.snapshot(commit), size)


def _check_folder(
    folder: Path, model: str, confine: _Confine, tree: Mapping[str, TreeEntry] | None
) -> int:
    """Checks every file that loading needs; returns their bytes."""

    def real_path(file: str) -> Path:
        real = Path(os.path.realpath(folder / file))
        confine(file, real)
        if not real.is_file():
            raise SnapshotIncompleteError(model, file)
        return real

    present = _names(folder)
    names = present if tree is None else tree.keys()
    _check_config(_read(real_path(CONFIG), CONFIG, model), model)
    index = weights_index(names, model)
    shards = None
    if index is not None:
        shards = read_shards(_read(real_path(index), index, model), model)
    total = 0
    for file in select(present | (_ESSENTIAL & set(names)), shards):
        real = real_path(file)
        size = real.stat().st_size
        entry = None if tree is None else tree.get(file)
        if entry is not None and size != entry.size:
            raise SnapshotCorruptError(model, file, f"{entry.size} bytes", f"{size} bytes")
        if file.endswith(".safetensors"):
            check_weights(real, file, model)
        total += size
    return total


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


def _read(path: Path, file: str, model: str) -> bytes:
    with open_unnoticed(path) as content:
        data = content.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise SnapshotCorruptError(model, file, f"at most {MAX_JSON_BYTES} bytes", "more")
    return data
