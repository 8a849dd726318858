"""What the fake deletes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loaderd.v1 import cache_pb2
from tests.fake_daemon.cache import Cache, Key
from tests.fake_daemon.failure import FailureError

MOST_NAMES = 1000


def delete(cache: Cache, names: Sequence[str], *, dry_run: bool) -> cache_pb2.Deletion:
    """Deletes snapshots by name, all or none.

    Raises:
        FailureError: A name has no snapshot, one is in use, or there are too few or many names.
    """
    if not 1 <= len(names) <= MOST_NAMES:
        raise FailureError("INVALID_ARGUMENT", field="models", problem="must be 1 to 1000 names")
    chosen = list(dict.fromkeys(key for name in names for key in cache.find(name)))
    for key in chosen:
        holders = cache.users_of(key)
        if holders and not dry_run:
            raise FailureError("SNAPSHOT_IN_USE", model="@".join(key), holders=", ".join(holders))
    return _delete(cache, chosen, orphans=False, dry_run=dry_run)


def prune(cache: Cache, request: cache_pb2.PruneCacheRequest) -> cache_pb2.Deletion:
    """Deletes what meets a condition.

    Raises:
        FailureError: No condition is given, or a time span is negative.
    """
    limited = request.HasField("max_bytes")
    if not (request.orphans or request.unreferenced or request.HasField("unused_for") or limited):
        raise FailureError("INVALID_ARGUMENT", field="conditions", problem="give at least one")
    if request.unused_for.ToTimedelta().total_seconds() < 0:
        raise FailureError("INVALID_ARGUMENT", field="unused_for", problem="must not be negative")
    chosen = [key for key in cache.held() if _is_meant(cache, key, request)]
    if limited:
        others = [key for key in cache.held() if key not in chosen and not cache.users_of(key)]
        while others and cache.size_of(_without(cache.held(), chosen)) > request.max_bytes:
            chosen.append(others.pop())
    return _delete(cache, chosen, orphans=request.orphans or limited, dry_run=request.dry_run)


def _is_meant(cache: Cache, key: Key, request: cache_pb2.PruneCacheRequest) -> bool:
    snapshot = cache.snapshot(key)
    idle_s = time.time() - snapshot.last_used_at.seconds
    long_unused = (
        request.HasField("unused_for")
        and idle_s >= request.unused_for.ToTimedelta().total_seconds()
    )
    return long_unused or (request.unreferenced and not snapshot.refs)


def _delete(cache: Cache, chosen: list[Key], *, orphans: bool, dry_run: bool) -> cache_pb2.Deletion:
    kept = [key for key in chosen if cache.users_of(key)]
    gone = _without(chosen, kept)
    left = cache.size_of(_without(cache.held(), gone))
    orphan_bytes = sum(cache.orphans.values())
    deletion = cache_pb2.Deletion(
        snapshots=map(cache.snapshot, gone),
        freed_bytes=cache.size_of(cache.held()) - left + (orphan_bytes if orphans else 0),
        orphan_files=len(cache.orphans) if orphans else 0,
        kept=map(cache.snapshot, kept),
        remaining_bytes=left + (0 if orphans else orphan_bytes),
    )
    if not dry_run:
        for key in gone:
            cache.remove(key)
        if orphans:
            cache.orphans.clear()
    return deletion


def _without(keys: list[Key], others: list[Key]) -> list[Key]:
    return [key for key in keys if key not in others]
