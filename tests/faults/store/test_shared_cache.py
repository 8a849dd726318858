"""The hub library's own downloads and ours on one cache."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from loaderd.server.errors import SnapshotInUseError
from loaderd.server.store.deletion import PrunePolicy
from loaderd.server.store.keeper import Target
from loaderd.server.store.store import CachedSnapshot, DownloadProgress, ModelStore
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    WEIGHTS,
    contents,
    download,
    gets,
    listed,
    litter,
    partial_files,
)
from tests.hub import Hub, HubRepo, faults

_PLAIN = """
import json, sys
from huggingface_hub import constants, snapshot_download
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18  # it writes in such steps
print(json.dumps(snapshot_download("org/model", cache_dir=sys.argv[1])))
"""


async def plain_download(hub: Hub, cache: Path) -> asyncio.subprocess.Process:
    """A process that downloads the model with the hub library alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PLAIN,
        cache,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


async def has_bytes(store: ModelStore) -> bool:
    """Whether a listed snapshot has a file by now, not only its folder."""
    return any(info.size_bytes for info in await listed(store))


async def result(process: asyncio.subprocess.Process) -> Path:
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return Path(json.loads(output))


async def test_what_we_download_the_library_takes_as_its_own(
    store: ModelStore, cache: Path
) -> None:
    ours = await download(store)
    # The library wants every file of a repository unless it is told which.
    theirs = snapshot_download(
        "org/model", cache_dir=cache, local_files_only=True, allow_patterns=sorted(NEEDED)
    )
    assert Path(theirs) == ours.path
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    (repo,) = scanned.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash) == ("org/model", ours.commit)
    assert {file.file_name for file in revision.files} == NEEDED
    assert repo.size_on_disk == ours.size_bytes
    assert (cache / "CACHEDIR.TAG").is_file()
    link = (ours.path / "config.json").readlink()
    assert link.parts[:-1] == ("..", "..", "blobs")


async def test_what_we_leave_unfinished_does_not_trouble_the_library(
    store: ModelStore, hub: Hub, repo: HubRepo, cache: Path
) -> None:
    ours = await download(store)
    repo.commit({"model.safetensors": MODEL["model.safetensors"][:-1] + b"\0"})
    hub.inject(faults.hang(after_bytes=1_000_000), path=WEIGHTS)
    task = asyncio.create_task(download(store))
    async with asyncio.timeout(30):
        while not partial_files(cache):
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(partial_files(cache)) == 1
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    commits = {revision.commit_hash for each in scanned.repos for revision in each.revisions}
    assert ours.commit in commits


async def test_what_the_library_downloads_needs_nothing_more(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    theirs = await result(await plain_download(hub, cache))
    fetched = gets(hub)
    ours = await download(store)
    assert ours.path == theirs
    assert gets(hub) == fetched
    assert await store.resolve(NAME) == ours


async def test_a_file_that_the_library_fetches_now_is_waited_for(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.throttle(5e5), path=WEIGHTS)
    plain = await plain_download(hub, cache)
    async with asyncio.timeout(30):
        while not gets(hub, "model.safetensors"):
            await asyncio.sleep(0.02)
    seen: list[DownloadProgress] = []
    ours = await download(store, on_progress=seen.append)
    assert await result(plain) == ours.path
    assert gets(hub, "model.safetensors") == ["model.safetensors"]
    assert {name: MODEL[name] for name in NEEDED}.items() <= contents(ours.path).items()
    # Its bytes are progress too.
    steps = {f.downloaded_bytes for p in seen for f in p.files if f.path == "model.safetensors"}
    assert len(steps) > 2
    assert (seen[-1].resumed_bytes, seen[-1].refetched_bytes) == (0, 0)


async def test_what_the_library_downloads_now_is_not_deleted(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.throttle(5e5), path=WEIGHTS)
    plain = await plain_download(hub, cache)
    async with asyncio.timeout(30):
        while not (gets(hub, "model.safetensors") and await has_bytes(store)):
            await asyncio.sleep(0.02)
    with pytest.raises(SnapshotInUseError, match="another process"):
        await store.delete([Target("org/model")], dry_run=False)
    pruned = await store.prune(PrunePolicy(orphans=True, max_bytes=0), dry_run=False)
    assert (pruned.snapshots, len(pruned.kept)) == ((), 1)
    theirs = await result(plain)
    assert {name: MODEL[name] for name in NEEDED}.items() <= contents(theirs).items()
    assert isinstance(await store.resolve(NAME), CachedSnapshot)
    await store.delete([Target("org/model")], dry_run=False)
    assert not theirs.exists()


async def test_a_file_that_the_library_leaves_halfway_is_brought(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.hang(after_bytes=2_000_000), path=WEIGHTS, times=1)
    plain = await plain_download(hub, cache)
    async with asyncio.timeout(30):
        while not (gets(hub, "model.safetensors") and litter(cache)):
            await asyncio.sleep(0.02)
    waiting = asyncio.create_task(download(store))
    await asyncio.sleep(1.0)  # it waits for the weights by now, or will do later
    assert not waiting.done()
    plain.kill()
    await plain.wait()
    async with asyncio.timeout(30):
        ours = await waiting
    assert isinstance(ours, CachedSnapshot)
    assert contents(ours.path)["model.safetensors"] == MODEL["model.safetensors"]
    # What the library left nobody can go on from.
    assert partial_files(cache) == []
    assert len(litter(cache)) == 1
