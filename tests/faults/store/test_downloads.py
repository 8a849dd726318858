"""Downloads that go well, with the real hub library against a local hub."""

from __future__ import annotations

import asyncio
import gzip
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from loaderd.server.store.names import HubName
from loaderd.server.store.store import (
    DownloadProgress,
    ModelStore,
    NotCached,
)
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    WEIGHTS,
    children,
    contents,
    download,
    found,
    gets,
    listed,
    partial_files,
    plan,
    settings,
)
from tests.hub import Access, Hub, HubRepo, Response, faults
from tests.unit.store.caches import SHARDED_MODEL, SMALL_MODEL


async def test_a_cold_download_brings_what_loading_needs_and_nothing_else(
    store: ModelStore, hub: Hub, repo: HubRepo, cache: Path
) -> None:
    assert await store.resolve(NAME) == NotCached(NAME)
    seen: list[DownloadProgress] = []
    snapshot = await download(store, on_progress=seen.append)
    head = repo.find("main")
    assert head is not None
    total = sum(len(MODEL[name]) for name in NEEDED)
    assert snapshot == await store.resolve(NAME)
    assert (snapshot.commit, snapshot.size_bytes, snapshot.stale) == (head.sha, total, False)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
    assert gets(hub) == sorted(NEEDED)
    assert {request.method for request in hub.requests} == {"GET"}
    assert (cache / "models--org--model/refs/main").read_text() == head.sha
    assert partial_files(cache) == []
    last = seen[-1]
    assert (last.downloaded_bytes, last.total_bytes) == (total, total)
    assert (last.completed_files, last.total_files) == (4, 4)
    assert last.bytes_per_second > 0
    assert all(p.total_bytes == total and p.downloaded_bytes <= total for p in seen)


async def test_a_hub_that_packs_text_is_understood(store: ModelStore, hub: Hub) -> None:
    def packed(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k != "Content-Length"}
        headers = {**kept, "Content-Encoding": "gzip", "Connection": "close"}
        return replace(response, headers=headers, body=[gzip.compress(b"".join(response.body))])

    hub.inject(packed, path="*/resolve/*.json")
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}


async def test_progress_comes_while_bytes_do(store: ModelStore, hub: Hub) -> None:
    hub.inject(faults.throttle(4e6), path=WEIGHTS)
    seen: list[int] = []
    await download(store, on_progress=lambda p: seen.append(p.downloaded_bytes))
    assert seen == sorted(seen)
    assert len({count for count in seen if 1_000_000 < count < 3_000_000}) >= 2


async def test_a_warm_download_asks_what_the_revision_is_and_fetches_nothing(
    store: ModelStore, hub: Hub
) -> None:
    first = await download(store)
    before = len(hub.requests)
    assert await download(store) == first
    asked = [request.path.split("/")[5] for request in hub.requests[before:]]
    assert asked == ["revision", "tree"]


async def test_shards_are_those_that_the_index_names(store: ModelStore, hub: Hub) -> None:
    repo = HubRepo("org/sharded")
    others = {"model-3-of-2.safetensors": b"old", "consolidated.safetensors": b"other layout"}
    templates = {"additional_chat_templates/rag.jinja": b"{{ x }}", "docs/config.json": b"{}"}
    repo.commit({**SHARDED_MODEL, **others, **templates})
    hub.add(repo)
    snapshot = await download(store, HubName("org/sharded"))
    wanted = {**SHARDED_MODEL, "additional_chat_templates/rag.jinja": b"{{ x }}"}
    assert contents(snapshot.path) == wanted


async def test_an_update_fetches_only_what_changed_and_keeps_the_old_snapshot(
    store: ModelStore, hub: Hub, repo: HubRepo
) -> None:
    old = await download(store)
    before = len(gets(hub))
    repo.commit({"config.json": b'{"new": true}'})
    seen: list[DownloadProgress] = []
    new = await download(store, on_progress=seen.append)
    assert new.commit != old.commit
    assert len(gets(hub)) == before + 1
    assert seen[-1].downloaded_bytes == new.size_bytes
    assert contents(new.path)["config.json"] == b'{"new": true}'
    assert await store.resolve(NAME) == new
    assert contents(old.path)["config.json"] == MODEL["config.json"]
    assert {info.commit: info.refs for info in await listed(store)} == {
        old.commit: (),
        new.commit: ("main",),
    }


async def test_revisions_are_branches_tags_commits_and_pull_requests(
    store: ModelStore, hub: Hub, repo: HubRepo
) -> None:
    old = repo.commit({})
    repo.point("v1.0", old)
    repo.commit({"config.json": b'{"pr": 1}'}, branch="refs/pr/1", parent="main")
    for revision in ("v1.0", "refs/pr/1", old):
        name = HubName("org/model", revision)
        snapshot = await download(store, name)
        assert snapshot.revision == revision
        assert await store.resolve(name) == snapshot
    assert isinstance(await store.resolve(NAME), NotCached)  # nobody asked for main


async def test_a_commit_that_is_there_needs_no_hub(store: ModelStore, hub: Hub) -> None:
    snapshot = await download(store)
    before = len(hub.requests)
    same = await download(store, HubName("org/model", snapshot.commit))
    assert same.path == snapshot.path
    assert len(hub.requests) == before


async def test_waiters_of_one_name_share_one_child_and_one_request_a_file(
    store: ModelStore, hub: Hub
) -> None:
    hub.inject(faults.throttle(6e6), path=WEIGHTS)
    seen: list[int] = []
    waiters = asyncio.gather(
        *(download(store, on_progress=lambda _: seen.append(len(children()))) for _ in range(4))
    )
    snapshots = await waiters
    assert len(set(snapshots)) == 1
    assert max(seen) == 1
    assert gets(hub) == sorted(NEEDED)


async def test_two_daemons_on_one_cache_fetch_each_file_once(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.throttle(1e6), path=WEIGHTS)
    # Shorter than the download: the one that waits for the other's lock sees its bytes come.
    other = ModelStore(settings(hub, cache, stall_timeout=1.8))
    first, second = await asyncio.gather(download(store), download(other))
    await other.close()
    assert first == second
    assert gets(hub, "model.safetensors") == ["model.safetensors"]


async def test_a_plan_says_what_a_download_would_do_and_writes_nothing(
    store: ModelStore, repo: HubRepo, cache: Path
) -> None:
    planned = await plan(store)
    assert found(cache, "../*") == []
    assert {file.path: file.size_bytes for file in planned.files} == {
        name: len(MODEL[name]) for name in NEEDED
    }
    assert planned.total_bytes == planned.missing_bytes == sum(len(MODEL[name]) for name in NEEDED)
    await download(store)
    repo.commit({"tokenizer.json": b'{"new": 1}'})
    planned = await plan(store)
    assert [file.path for file in planned.files if not file.cached] == ["tokenizer.json"]
    assert planned.missing_bytes == 10


async def test_a_private_repository_opens_to_the_token(hub: Hub, cache: Path) -> None:
    repo = HubRepo("org/private", access=Access.PRIVATE, token="hf_secret")
    repo.commit(SMALL_MODEL)
    hub.add(repo)
    store = ModelStore(settings(hub, cache, hub_token="hf_secret"))
    snapshot = await download(store, HubName("org/private"))
    await store.close()
    assert contents(snapshot.path) == SMALL_MODEL
    assert {request.token for request in hub.requests} == {"hf_secret"}


async def test_without_a_token_none_is_sent_whatever_the_environment_holds(
    store: ModelStore, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    await download(store)
    assert {request.token for request in hub.requests} == {None}


async def test_nothing_is_downloaded_twice_under_two_names_of_a_blob(
    store: ModelStore, hub: Hub
) -> None:
    repo = HubRepo("org/twins")
    repo.commit({**SMALL_MODEL, "added_tokens.json": SMALL_MODEL["tokenizer.json"]})
    hub.add(repo)
    snapshot = await download(store, HubName("org/twins"))
    assert snapshot.size_bytes == sum(map(len, SMALL_MODEL.values())) + 2
    assert len(gets(hub)) == 4
