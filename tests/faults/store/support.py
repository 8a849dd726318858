"""What the tests of downloads share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.names import HubName
from loaderd.server.store.scan import SnapshotInfo
from loaderd.server.store.store import (
    CachedSnapshot,
    DownloadPlan,
    DownloadProgress,
    ModelStore,
    StoreSettings,
)
from tests.folders import paths_below
from tests.hub import Hub
from tests.unit.store.caches import SMALL_MODEL, safetensors

NAME = HubName("org/model")
WEIGHTS = "*/model.safetensors"
INFO = "/api/models/*/revision/*"
TREE = "/api/models/*/tree/*"

MODEL = {
    **SMALL_MODEL,
    "model.safetensors": safetensors(3_000_000, os.urandom(1)),
    "README.md": b"not needed",
    "pytorch_model.bin": b"a pickle",
}
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

QUICK = RetryPolicy(attempts=3, first_wait=0.05, longest_wait=0.2)


def settings(hub: Hub, cache: Path, **changes: Any) -> StoreSettings:
    base = StoreSettings(cache, hub_endpoint=hub.url, stall_timeout=20.0, retry=QUICK)
    return replace(base, **changes)


async def download(
    store: ModelStore,
    name: HubName = NAME,
    on_progress: Callable[[DownloadProgress], None] = lambda _: None,
) -> CachedSnapshot:
    async with store.download(name) as flight:
        async for state in flight.progress():
            if state.progress.total_bytes:
                on_progress(state.progress)
        return await flight.result()


async def plan(store: ModelStore, name: HubName = NAME) -> DownloadPlan:
    """What a download would fetch, for a name that the cache has not got or not whole."""
    found = await store.look_up(name, refresh=True)
    assert isinstance(found, DownloadPlan)
    return found


async def listed(store: ModelStore) -> list[SnapshotInfo]:
    """The cache's snapshots."""
    return list((await store.snapshots()).snapshots)


def contents(snapshot: Path) -> dict[str, bytes]:
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in files}


def gets(hub: Hub, path: str = "") -> list[str]:
    """The files whose content was asked for, by name."""
    wanted = (r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path)
    return sorted(p.rpartition("/")[2] for p in wanted if p.endswith(path))


def children() -> list[psutil.Process]:
    """The download children of this process that are alive."""
    return [p for p in psutil.Process().children(recursive=True) if is_child(p)]


def is_child(process: psutil.Process) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and "loaderd.server.store.hub_child" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def found(cache: Path, pattern: str) -> list[Path]:
    return sorted(cache.glob(pattern))


def partial_files(cache: Path) -> list[Path]:
    """What came of files that are not whole, for the next download to go on from."""
    return [path for path in _files(cache, {".incomplete"}) if path.stem.isalnum()]


def litter(cache: Path) -> list[Path]:
    """What nobody can use."""
    unfinished = _files(cache, {".incomplete", ".tmp"})
    return sorted(set(unfinished) - set(partial_files(cache)))


def _files(cache: Path, suffixes: set[str]) -> list[Path]:
    return sorted(path for path in paths_below(cache) if path.suffix in suffixes)


def ranges(hub: Hub, path: str = "model.safetensors") -> list[str | None]:
    """What of a file was asked for, request by request; None is all."""
    return [r.range for r in hub.requests if "/resolve/" in r.path and r.path.endswith(path)]
