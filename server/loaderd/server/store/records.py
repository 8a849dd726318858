"""What the daemon remembers of a repository beside the hub library's own files.

When a snapshot was used, which commit of a revision was whole, which contents were hashed. One
small file in the repository's folder, which the library does not look at: `.loaderd.json`. Several
daemons may share a cache: whoever changes the file holds its lock, and whoever does not get that
raises TimeoutError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loaderd.server.store.cache import RepoFolder, replace_text, writing
from loaderd.server.store.locks import locked
from loaderd.server.store.names import is_commit
from loaderd.server.store.reading import read_small

FORMAT_VERSION = 1

_LOCK = "loaderd"
_LONGEST = 16 << 20


def note_used(repo: RepoFolder, commit: str, when: datetime) -> None:
    """Remembers when a snapshot was used. The latest time counts, in whatever order they come.

    Args:
        repo: The repository.
        commit: The snapshot's commit.
        when: With a time zone.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """

    def note(records: _Records) -> _Records:
        latest = max(when.astimezone(UTC), records.used.get(commit, when))
        return replace(records, used={**records.used, commit: latest})

    _change(repo, note)


def last_used(repo: RepoFolder) -> dict[str, datetime]:
    """When snapshots were used last, by commit, as far as it is remembered."""
    return dict(_read(repo).used)


def note_complete(repo: RepoFolder, revision: str, commit: str) -> None:
    """Remembers that a revision's snapshot is whole.

    Another program may move the revision on and then fail to fetch it. This is then the last
    good one.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """
    _change(repo, lambda old: replace(old, complete={**old.complete, revision: commit}))


def last_complete(repo: RepoFolder, revision: str) -> str | None:
    """The commit that was last known to be whole; it may be deleted or damaged since."""
    return _read(repo).complete.get(revision)


def note_hashed(repo: RepoFolder, stamps: Mapping[str, str], wrong: Collection[str] = ()) -> None:
    """Remembers contents that were hashed.

    Args:
        repo: The repository.
        stamps: `digests.stamp_of` each file that is right, before it was hashed, by its digest.
        wrong: Digests of files that turned out to be something else.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """

    def note(old: _Records) -> _Records:
        left = {digest: stamp for digest, stamp in old.hashed.items() if digest not in wrong}
        return replace(old, hashed={**left, **stamps})

    _change(repo, note)


def hashed(repo: RepoFolder) -> dict[str, str]:
    """The stamps of contents that were hashed, by their digest; see `note_hashed`."""
    return dict(_read(repo).hashed)


def forget(repo: RepoFolder, commits: Collection[str]) -> None:
    """Drops all that is remembered of snapshots that were deleted.

    Raises:
        CacheNotWritableError: The cache cannot be written to.
    """

    def drop(records: _Records) -> _Records:
        used = {commit: when for commit, when in records.used.items() if commit not in commits}
        complete = {name: each for name, each in records.complete.items() if each not in commits}
        # Where links do not work contents are not in `blobs`: those are hashed once more.
        left = {
            digest: stamp
            for digest, stamp in records.hashed.items()
            if (repo.blobs / digest).is_file()
        }
        return _Records(used, complete, left)

    _change(repo, drop)


def path_of(repo: RepoFolder) -> Path:
    """The file."""
    return repo.path / ".loaderd.json"


@dataclass(frozen=True)
class _Records:
    used: Mapping[str, datetime] = field(default_factory=dict)
    complete: Mapping[str, str] = field(default_factory=dict)
    hashed: Mapping[str, str] = field(default_factory=dict)


def _change(repo: RepoFolder, change: Callable[[_Records], _Records]) -> None:
    with writing(repo.cache_dir):
        if not repo.path.is_dir():  # deleted meanwhile: nothing to remember
            return
        with locked(repo.lock(_LOCK)):
            old = _read(repo)
            new = change(old)
            if new != old:
                replace_text(path_of(repo), _encode(new))


def _encode(records: _Records) -> str:
    data = {
        "format_version": FORMAT_VERSION,
        "used": {commit: when.isoformat() for commit, when in records.used.items()},
        "complete": dict(records.complete),
        "hashed": dict(records.hashed),
    }
    return json.dumps(data, indent=1)


def _read(repo: RepoFolder) -> _Records:
    """What is remembered; nothing when the file is damaged: it only ever helps."""
    try:
        data = json.loads(read_small(path_of(repo), _LONGEST))
        if data["format_version"] != FORMAT_VERSION:
            return _Records()
        used = {commit: _time(text) for commit, text in _by_name(data["used"])}
        complete = {name: _commit(commit) for name, commit in _by_name(data["complete"])}
        hashed = {digest: str(stamp) for digest, stamp in _by_name(data.get("hashed", {}))}
        return _Records(used, complete, hashed)
    except (OSError, LookupError, ValueError, TypeError, AttributeError):
        return _Records()
    except (OverflowError, RecursionError):  # a date past the last, brackets without end
        return _Records()


def _by_name(data: Any) -> list[tuple[str, str]]:
    return list(data.items())


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _commit(text: str) -> str:
    if not is_commit(text):
        raise ValueError("not a commit")
    return text
