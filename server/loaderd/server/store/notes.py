"""Writes down what the daemon wants to remember of its cache, where it may be written to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.resolve import CachedSnapshot

_log = logging.getLogger(__name__)


def note_use(cache_dir: Path, files: CachedSnapshot) -> None:
    """Remembers that a snapshot is used now, and that its revision is whole."""
    repo = RepoFolder(cache_dir, files.repo_id)

    def note() -> None:
        records.note_used(repo, files.commit, datetime.now(UTC))
        if not files.stale:
            records.note_complete(repo, files.revision, files.commit)

    _if_writable(repo, note)


def note_hashed(repo: RepoFolder, stamps: Mapping[str, str], wrong: Collection[str] = ()) -> None:
    """Remembers contents that were hashed; see `records.note_hashed`."""
    if stamps or wrong:
        _if_writable(repo, lambda: records.note_hashed(repo, stamps, wrong))


def _if_writable(repo: RepoFolder, note: Callable[[], None]) -> None:
    """A cache may be read-only: then nothing is remembered, which costs time and no more."""
    try:
        note()
    except (CacheNotWritableError, OSError) as error:
        _log.info("nothing is noted of %s: %s", repo.repo_id, error)
