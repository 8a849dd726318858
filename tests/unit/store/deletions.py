"""Deletions planned and done, by users that are made up."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from loaderd.server.store import deletion
from loaderd.server.store.deletion import (
    Busy,
    Deletion,
    Holders,
    PrunePolicy,
    plan_deletion,
    plan_prune,
)
from loaderd.server.store.scan import SnapshotInfo
from tests.unit.store.caches import scan

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def nobody(snapshot: SnapshotInfo) -> tuple[str, ...]:
    return ()


def used(*commits: str) -> Holders:
    """The holders when these commits are used, by a model."""
    return lambda info: ("m:1",) if info.commit in commits else ()


def idle(repo_id: str) -> bool:
    return False


def plan(cache: Path, *commits: str, holders: Holders = nobody, busy: Busy = idle) -> Deletion:
    contents = scan(cache)
    chosen = [info for info in contents.snapshots if info.commit in commits]
    return plan_deletion(contents, chosen, holders, busy)


def prune(
    cache: Path,
    policy: PrunePolicy,
    holders: Holders = nobody,
    now: datetime = NOW,
    busy: Busy = idle,
) -> Deletion:
    return plan_prune(scan(cache), policy, holders, now, busy)


def execute(plan: Deletion, cache: Path, busy: Busy = idle) -> None:
    deletion.execute(plan, cache, busy)


def commits(infos: tuple[SnapshotInfo, ...]) -> set[str]:
    return {info.commit for info in infos}


def on_disk(cache: Path) -> int:
    """Bytes of all contents in the repositories and in the store that they share."""
    blobs = [*cache.glob("models--*/blobs/*"), *cache.glob("blobs/*/*")]
    return sum(path.lstat().st_size for path in blobs if not path.is_symlink())
