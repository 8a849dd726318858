"""A hub that fails: what the caller is told, what is on disk then, and that trying again helps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loaderd.server.errors import (
    HubRateLimitedError,
    HubUnreachableError,
    LoaderdError,
    ModelGatedError,
    ModelNotFoundError,
    ModelUnsupportedError,
    OfflineNotCachedError,
    RevisionNotFoundError,
    SnapshotCorruptError,
)
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.names import HubName
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached
from tests.faults.store.support import (
    INFO,
    MODEL,
    NAME,
    TREE,
    WEIGHTS,
    children,
    contents,
    download,
    found,
    listed,
    litter,
    plan,
    ranges,
    settings,
)
from tests.hub import Access, Hub, HubRepo, faults
from tests.hub.faults import Fault
from tests.unit.store.caches import SMALL_MODEL


async def failed(store: ModelStore, cache: Path, name: HubName = NAME) -> LoaderdError:
    """The error of a download that leaves nothing that is of no use."""
    with pytest.raises(LoaderdError) as caught:
        await download(store, name)
    assert children() == []
    assert litter(cache) == []
    assert isinstance(await store.resolve(name), NotCached)
    assert not any(info.complete for info in await listed(store))
    return caught.value


# --- what the hub says ---------------------------------------------------------------------------


async def test_a_missing_repository(store: ModelStore, cache: Path) -> None:
    error = await failed(store, cache, HubName("org/none"))
    assert isinstance(error, ModelNotFoundError)
    assert error.model == "org/none"
    assert found(cache, "models--*") == []


async def test_a_missing_revision(store: ModelStore, cache: Path) -> None:
    for revision in ("v9", "f" * 40):
        error = await failed(store, cache, HubName("org/model", revision))
        assert isinstance(error, RevisionNotFoundError)
        assert (error.model, error.revision) == ("org/model", revision)


async def test_a_revision_that_is_gone_is_said_even_when_the_cache_has_it(
    store: ModelStore, hub: Hub, repo: HubRepo
) -> None:
    name = HubName("org/model", "v1")
    repo.point("v1", "main")
    await download(store, name)
    replacement = HubRepo("org/model")
    replacement.commit(MODEL)
    hub.add(replacement)
    with pytest.raises(RevisionNotFoundError):
        await download(store, name)
    assert isinstance(await store.resolve(name), CachedSnapshot)


@pytest.mark.parametrize(
    ("access", "error"),
    [(Access.GATED, ModelGatedError), (Access.PRIVATE, ModelNotFoundError)],
)
async def test_a_repository_that_the_token_does_not_open(
    hub: Hub, cache: Path, access: Access, error: type[LoaderdError]
) -> None:
    repo = HubRepo("org/closed", access=access, token="hf_right")
    repo.commit(SMALL_MODEL)
    hub.add(repo)
    name = HubName("org/closed")
    store = ModelStore(settings(hub, cache, hub_token="hf_wrong"))
    assert isinstance(await failed(store, cache, name), error)
    await store.close()
    store = ModelStore(settings(hub, cache, hub_token="hf_right"))
    assert contents((await download(store, name)).path) == SMALL_MODEL
    await store.close()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"pickle"}, "safetensors"),
        ({"model.safetensors": b"x", "README.md": b"x"}, "config.json"),
        ({**SMALL_MODEL, "model.safetensors": None}, "safetensors"),
        (
            {
                "config.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"w": "a.safetensors"}}',
            },
            "lacks",
        ),
    ],
    ids=["pickles", "no config", "no weights", "no shard"],
)
async def test_a_repository_without_a_loadable_model(
    store: ModelStore, hub: Hub, cache: Path, files: dict[str, bytes | None], problem: str
) -> None:
    repo = HubRepo("org/other")
    repo.commit(files)
    hub.add(repo)
    name = HubName("org/other")
    error = await failed(store, cache, name)
    assert isinstance(error, ModelUnsupportedError)
    assert problem in error.problem
    with pytest.raises(ModelUnsupportedError):
        await plan(store, name)


@pytest.mark.parametrize("cut", [faults.short_body, faults.reset])
async def test_a_broken_body_goes_on_where_it_was(
    store: ModelStore, hub: Hub, cut: Callable[..., Fault]
) -> None:
    # A reset loses what has not been read yet, so there is time to read.
    hub.inject(faults.hang(after_bytes=2_500_000, seconds=0.5), path=WEIGHTS, times=1)
    hub.inject(cut(after_bytes=2_500_001), path=WEIGHTS, times=1)
    await download(store)
    asked = ranges(hub)
    assert asked[0] is None
    assert [int((part or "").removeprefix("bytes=").removesuffix("-")) for part in asked[1:]] == [
        2_500_001
    ]


async def test_a_plan_that_hangs_is_given_up(hub: Hub, cache: Path) -> None:
    hub.inject(faults.hang(), path=TREE)
    store = ModelStore(settings(hub, cache, stall_timeout=0.6))
    async with asyncio.timeout(15):
        with pytest.raises(HubUnreachableError):
            await plan(store)
    assert children() == []
    await store.close()


async def test_a_wait_that_the_hub_asks_for_is_no_silence(hub: Hub, cache: Path) -> None:
    hub.inject(faults.status(429, {"Retry-After": "5"}), path=INFO)
    patient = RetryPolicy(attempts=3, first_wait=0.1, longest_wait=10.0)
    store = ModelStore(settings(hub, cache, stall_timeout=2.0, retry=patient))
    assert isinstance(await failed(store, cache), HubRateLimitedError)
    await store.close()


async def test_a_slow_hub_is_no_silent_one(hub: Hub, cache: Path) -> None:
    repo = HubRepo("org/model")
    repo.commit(SMALL_MODEL)
    hub.add(repo)
    hub.inject(faults.hang(seconds=0.5), method="*")
    store = ModelStore(settings(hub, cache, stall_timeout=1.6))
    assert isinstance(await download(store), CachedSnapshot)
    await store.close()


async def test_a_hub_that_is_gone(store: ModelStore, hub: Hub, cache: Path) -> None:
    hub.stop()
    assert isinstance(await failed(store, cache), HubUnreachableError)
    hub.start()
    assert isinstance(await download(store), CachedSnapshot)


# --- what the cache has is served when the hub does not answer -----------------------------------


async def test_a_failed_update_leaves_the_old_snapshot_in_place(
    store: ModelStore, hub: Hub, repo: HubRepo
) -> None:
    first = await download(store)
    repo.commit({"model.safetensors": MODEL["model.safetensors"][:-1] + b"\0"})
    hub.inject(faults.wrong_bytes(offset=2_000_000), path=WEIGHTS)
    with pytest.raises(SnapshotCorruptError):
        await download(store)
    assert await store.resolve(NAME) == first
    complete = {info.commit: info.complete for info in await listed(store)}
    assert complete.pop(first.commit) is True
    assert list(complete.values()) == [False]


async def test_what_the_hub_denies_is_not_served_stale(
    store: ModelStore, hub: Hub, repo: HubRepo
) -> None:
    await download(store)
    hub.inject(faults.status(403, {"X-Error-Code": "GatedRepo"}), path=INFO)
    with pytest.raises(ModelGatedError):
        await download(store)


async def test_offline_the_hub_is_never_asked(hub: Hub, cache: Path, store: ModelStore) -> None:
    offline = ModelStore(settings(hub, cache, offline=True))
    for attempt in (download(offline), plan(offline)):
        with pytest.raises(OfflineNotCachedError) as caught:
            await attempt
        assert caught.value.model == "org/model"
    assert hub.requests == []
    online = await download(store)
    asked = len(hub.requests)
    assert await download(offline) == replace(online, stale=True)
    assert len(hub.requests) == asked
