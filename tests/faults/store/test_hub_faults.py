"""A hub that fails: what the caller is told, what is on disk then, and that trying again helps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from loaderd.server.errors import (
    HubRateLimitedError,
    HubUnauthorizedError,
    HubUnreachableError,
    LoaderdError,
    ModelGatedError,
    ModelNotFoundError,
    ModelUnsupportedError,
    OfflineNotCachedError,
    RevisionNotFoundError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.names import HubName
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached
from tests.faults.store.support import (
    INFO,
    MODEL,
    NAME,
    NEEDED,
    TREE,
    WEIGHTS,
    children,
    contents,
    download,
    found,
    gets,
    listed,
    litter,
    plan,
    ranges,
    settings,
)
from tests.hub import Access, Hub, HubRepo, Response, faults
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


# --- a hub that does not answer as it should -----------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault without an end, and the error that it ends in."""

    fault: Fault
    error: type[LoaderdError]
    path: str


def _html(_response: Response, _stopped: object) -> Response:
    return Response.text(200, b"<html>Please log in to the Wi-Fi</html>", "text/html")


LASTING = {
    "500": Case(faults.status(500), HubUnreachableError, INFO),
    "503 on tree": Case(faults.status(503, {"Retry-After": "9999"}), HubUnreachableError, TREE),
    "429": Case(faults.status(429, {"Retry-After": "9999"}), HubRateLimitedError, INFO),
    "429 on tree": Case(faults.status(429), HubRateLimitedError, TREE),
    "429 with limits": Case(
        faults.status(429, {"ratelimit": '"api";r=0;t=9999'}), HubRateLimitedError, TREE
    ),
    "429 on get": Case(faults.status(429, {"Retry-After": "9999"}), HubRateLimitedError, WEIGHTS),
    "500 on get": Case(faults.status(500), HubUnreachableError, WEIGHTS),
    "408 on get": Case(faults.status(408), HubUnreachableError, WEIGHTS),
    "bare 401": Case(faults.status(401), HubUnauthorizedError, INFO),
    "bare 401 on tree": Case(faults.status(401), HubUnauthorizedError, TREE),
    "bare 401 on get": Case(faults.status(401), HubUnauthorizedError, WEIGHTS),
    "bare 403": Case(faults.status(403), HubUnauthorizedError, INFO),
    "bare 403 on get": Case(faults.status(403), HubUnauthorizedError, WEIGHTS),
    "401 without the repository": Case(
        faults.status(401, {"X-Error-Code": "RepoNotFound"}), ModelNotFoundError, INFO
    ),
    "403 gated on get": Case(
        faults.status(403, {"X-Error-Code": "GatedRepo"}), ModelGatedError, WEIGHTS
    ),
    "bare 404": Case(faults.status(404), ModelNotFoundError, INFO),
    "400": Case(faults.status(400), HubUnreachableError, INFO),
    "a web page": Case(_html, HubUnreachableError, "/api/*"),
    "a web page for the tree": Case(_html, HubUnreachableError, TREE),
    "reset": Case(faults.reset(after_bytes=0), HubUnreachableError, INFO),
    "file is gone": Case(
        faults.status(404, {"X-Error-Code": "EntryNotFound"}), SnapshotIncompleteError, WEIGHTS
    ),
    "wrong bytes": Case(faults.wrong_bytes(offset=2_000_000), SnapshotCorruptError, WEIGHTS),
    "other length": Case(faults.status(200, body=b"x" * 100), SnapshotCorruptError, WEIGHTS),
}


@pytest.mark.parametrize("case", LASTING.values(), ids=LASTING)
async def test_a_lasting_fault_has_its_error_and_a_healed_hub_serves(
    store: ModelStore, hub: Hub, cache: Path, case: Case
) -> None:
    hub.inject(case.fault, path=case.path)
    error = await failed(store, cache)
    assert type(error) is case.error
    assert error.metadata["model"] == "org/model"
    hub.heal()
    snapshot = await download(store)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


@pytest.mark.parametrize("name", ["wrong bytes", "other length", "file is gone"])
async def test_the_error_names_the_file(
    store: ModelStore, hub: Hub, cache: Path, name: str
) -> None:
    case = LASTING[name]
    hub.inject(case.fault, path=case.path)
    error = await failed(store, cache)
    assert error.metadata["file"] == "model.safetensors"
    assert found(cache, "*/snapshots/*/model.safetensors") == []
    # What came whole is kept: only the weights are fetched again.
    hub.heal()
    before = gets(hub)
    await download(store)
    assert gets(hub) == sorted([*before, "model.safetensors"])


PASSING: dict[str, tuple[Fault, str]] = {
    "500 on info": (faults.status(500), INFO),
    "503 on tree": (faults.status(503), TREE),
    "429 on get": (faults.status(429, {"Retry-After": "0"}), WEIGHTS),
    "408 on get": (faults.status(408), WEIGHTS),
    "500 on get": (faults.status(500), WEIGHTS),
    "reset of info": (faults.reset(after_bytes=0), INFO),
    "reset before the body": (faults.reset(after_bytes=0), WEIGHTS),
    "reset in the body": (faults.reset(after_bytes=2_500_000), WEIGHTS),
    "no commit told": (faults.alter_headers(x_repo_commit=None), WEIGHTS),
    "no etag told": (faults.alter_headers(etag=None, x_linked_etag=None), WEIGHTS),
    "no size told": (faults.alter_headers(content_length=None, connection="close"), WEIGHTS),
    "end in the body": (faults.short_body(after_bytes=2_500_000), WEIGHTS),
}


@pytest.mark.parametrize(("fault", "path"), PASSING.values(), ids=PASSING)
async def test_a_passing_fault_is_not_noticed(
    store: ModelStore, hub: Hub, fault: Fault, path: str
) -> None:
    hub.inject(fault, path=path, times=1)
    snapshot = await download(store)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


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


HANGING = {
    "info": (faults.hang(), INFO),
    "tree": (faults.hang(), TREE),
    "get": (faults.hang(), WEIGHTS),
    "body": (faults.hang(after_bytes=1_500_000), WEIGHTS),
}


@pytest.mark.parametrize(("fault", "path"), HANGING.values(), ids=HANGING)
async def test_a_hub_that_falls_silent_is_given_up(
    store: ModelStore, hub: Hub, cache: Path, fault: Fault, path: str
) -> None:
    hub.inject(fault, path=path)
    impatient = ModelStore(settings(hub, cache, stall_timeout=0.6))
    async with asyncio.timeout(15):
        assert isinstance(await failed(impatient, cache), HubUnreachableError)
    await impatient.close()
    hub.heal()
    assert isinstance(await download(store), CachedSnapshot)


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


OUTAGES: dict[str, Callable[[Hub], None]] = {
    "gone": Hub.stop,
    "500": lambda hub: hub.inject(faults.status(500), path="/api/*"),
    "429": lambda hub: hub.inject(faults.status(429), path="/api/*"),
    "weights 503": lambda hub: hub.inject(faults.status(503), path=WEIGHTS, method="*"),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
async def test_the_last_whole_snapshot_is_served_as_stale(
    store: ModelStore, hub: Hub, repo: HubRepo, outage: Callable[[Hub], None]
) -> None:
    first = await download(store)
    repo.commit({"model.safetensors": MODEL["model.safetensors"][:-1] + b"\0"})
    outage(hub)
    stale = await download(store)
    assert stale.stale
    assert stale.path == first.path
    assert contents(stale.path) == {name: MODEL[name] for name in NEEDED}
    hub.heal()
    hub.stop()
    hub.start()
    fresh = await download(store)
    assert not fresh.stale
    assert fresh.commit != first.commit


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
