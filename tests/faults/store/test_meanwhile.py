"""What others do in the cache in the middle of a download: other programs, other daemons."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
from pathlib import Path
from typing import Any

import pytest

from loaderd.server.store import hub as hub_functions
from loaderd.server.store import hub_download, hub_fetch
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.deletion import PrunePolicy
from loaderd.server.store.downloads import Downloads
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_cache import link, tag
from loaderd.server.store.keeper import Keeper
from loaderd.server.store.plan import DownloadPlan
from loaderd.server.store.store import ModelStore
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    QUICK,
    contents,
    download,
    gets,
    settings,
)
from tests.hub import Hub

WEIGHTS = MODEL["model.safetensors"]
DAMAGED = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


async def admit_all(_plan: DownloadPlan) -> None:
    pass


def weights_blob(cache: Path) -> Path:
    return RepoFolder(cache, "org/model").blobs / DIGEST


async def bring(hub: Hub, cache: Path, plan: DownloadPlan | None = None) -> Path:
    """A download by another process than the store's, as far as the store can tell."""

    def run() -> Path:
        access = HubAccess(hub.url, retry=QUICK)
        planned = plan or hub_functions.plan(NAME, cache, access)
        return hub_functions.download(planned, cache, access).path

    async with asyncio.timeout(60):
        return await asyncio.to_thread(run)


async def test_a_content_that_others_bring_meanwhile_is_hashed(
    store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room = Keeper.make_room

    async def meanwhile(keeper: Keeper, *args: Any) -> None:
        monkeypatch.undo()  # once
        weights_blob(cache).parent.mkdir(parents=True)
        weights_blob(cache).write_bytes(DAMAGED)  # its size and header are right
        await make_room(keeper, *args)

    monkeypatch.setattr(Keeper, "make_room", meanwhile)
    snapshot = await download(store)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


@pytest.mark.parametrize("there", [False, True])
async def test_what_a_download_links_now_is_not_pruned(
    hub: Hub, cache: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        snapshot = await bring(hub, cache)
        (snapshot / "model.safetensors").unlink()

    def meanwhile(pointer: Path, blob: Path, *, new: bool) -> None:
        if blob.name == DIGEST:
            other = ModelStore(settings(hub, cache))
            asyncio.run(other.prune(PrunePolicy(orphans=True), dry_run=False))
        link(pointer, blob, new=new)

    monkeypatch.setattr(hub_fetch, "link", meanwhile)
    snapshot = await bring(hub, cache)
    assert contents(snapshot) == {name: MODEL[name] for name in NEEDED}


async def test_what_is_pruned_before_it_is_linked_is_fetched(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await bring(hub, cache)
    (snapshot / "model.safetensors").unlink()

    def meanwhile(cache_dir: Path) -> None:
        weights_blob(cache).unlink()
        tag(cache_dir)

    monkeypatch.setattr(hub_download, "tag", meanwhile)
    assert contents(await bring(hub, cache)) == {name: MODEL[name] for name in NEEDED}


async def test_a_damaged_content_that_somebody_works_on_is_not_taken_away(
    hub: Hub, cache: Path
) -> None:
    snapshot = await bring(hub, cache)
    before = gets(hub)
    blob = weights_blob(cache)
    blob.write_bytes(b"damaged")
    lock = RepoFolder(cache, "org/model").lock(DIGEST)
    with lock.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        task = asyncio.create_task(bring(hub, cache))
        await asyncio.sleep(1.5)
        assert blob.read_bytes() == b"damaged"
        blob.write_bytes(WEIGHTS)
    assert await task == snapshot
    assert gets(hub) == before
    assert contents(snapshot) == {name: MODEL[name] for name in NEEDED}


async def test_a_repair_that_another_daemon_makes_is_waited_for(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    snapshot = await download(store)
    before = gets(hub)
    blob = weights_blob(cache)
    blob.write_bytes(DAMAGED)
    downloads = Downloads(cache, HubAccess(hub.url, retry=QUICK), stall_timeout=1.0)
    task = asyncio.create_task(
        downloads.download(NAME, lambda _: None, admit=admit_all, distrusted=["model.safetensors"])
    )
    with RepoFolder(cache, "org/model").lock(DIGEST).open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        partial = blob.with_name(f"{DIGEST}.incomplete")
        with partial.open("wb") as file:
            for start in range(0, len(WEIGHTS), len(WEIGHTS) // 20):
                file.write(WEIGHTS[start : start + len(WEIGHTS) // 20])
                file.flush()
                await asyncio.sleep(0.2)
        partial.rename(blob)
    async with asyncio.timeout(30):
        await task
    assert gets(hub) == before
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
    await downloads.close()


async def test_a_wrong_listing_in_the_cache_is_mended(store: ModelStore, cache: Path) -> None:
    snapshot = await download(store)
    repo = RepoFolder(cache, "org/model")
    listing = repo.read_tree(snapshot.commit) or {}
    repo.write_tree(snapshot.commit, {**listing, "config.json": listing["tokenizer.json"]})
    assert await download(store) == snapshot
    assert repo.read_tree(snapshot.commit) == listing
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
