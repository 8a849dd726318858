"""Downloads that the daemon must admit, and those that repair."""

from __future__ import annotations

import asyncio
import gc
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loaderd.server.errors import CacheLimitError
from loaderd.server.store import downloads as downloads_module
from loaderd.server.store.downloads import Downloads
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.plan import DownloadPlan
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached
from tests.faults.store.support import (
    INFO,
    MODEL,
    NAME,
    NEEDED,
    QUICK,
    children,
    contents,
    download,
    found,
    gets,
)
from tests.hub import Hub, faults
from tests.waiting import until_in_loop


@pytest.fixture
async def downloads(hub: Hub, cache: Path) -> AsyncIterator[Downloads]:
    downloads = Downloads(cache, HubAccess(hub.url, retry=QUICK), stall_timeout=1.0)
    yield downloads
    await downloads.close()
    assert children() == []


async def admit_all(_plan: DownloadPlan) -> None:
    pass


async def test_a_download_begins_when_it_is_admitted(
    downloads: Downloads, store: ModelStore, hub: Hub, cache: Path
) -> None:
    plans: list[DownloadPlan] = []

    async def admit(plan: DownloadPlan) -> None:
        plans.append(plan)
        await asyncio.sleep(2.5)  # more than the stall time-out
        assert gets(hub) == []
        assert found(cache, "*") == []

    done = await downloads.download(NAME, lambda _: None, admit=admit)
    (plan,) = plans
    assert plan.commit == done.commit
    assert {file.path for file in plan.files} == NEEDED
    assert {file.path for file in plan.skipped} == MODEL.keys() - NEEDED
    assert isinstance(await store.resolve(NAME), CachedSnapshot)


async def test_a_download_that_is_refused_writes_nothing(
    downloads: Downloads, store: ModelStore, hub: Hub, cache: Path
) -> None:
    async def refuse(plan: DownloadPlan) -> None:
        raise CacheLimitError(plan.missing_bytes, 1, 0)

    with pytest.raises(CacheLimitError):
        await downloads.download(NAME, lambda _: None, admit=refuse)
    assert children() == []
    assert gets(hub) == []
    assert found(cache, "*") == []
    assert isinstance(await store.resolve(NAME), NotCached)


async def test_a_file_that_is_distrusted_is_fetched_again_and_nothing_else(
    downloads: Downloads, store: ModelStore, hub: Hub
) -> None:
    snapshot = await download(store)
    weights = snapshot.path / "model.safetensors"
    damaged = MODEL["model.safetensors"][:-1] + b"\0"
    weights.resolve().write_bytes(damaged)
    await downloads.download(NAME, lambda _: None, admit=admit_all)
    assert weights.read_bytes() == damaged  # size and header are right
    before = gets(hub)
    await downloads.download(
        NAME, lambda _: None, admit=admit_all, distrusted=["model.safetensors"]
    )
    assert gets(hub) == sorted([*before, "model.safetensors"])
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


async def test_a_file_that_is_distrusted_without_reason_stays(
    downloads: Downloads, store: ModelStore, hub: Hub
) -> None:
    snapshot = await download(store)
    before = gets(hub)
    await downloads.download(NAME, lambda _: None, admit=admit_all, distrusted=NEEDED)
    assert gets(hub) == before
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


async def test_no_more_than_some_ask_the_hub_at_once_and_the_others_wait(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "MAX_CHILDREN", 2)
    downloads = Downloads(cache, HubAccess(hub.url, retry=QUICK), stall_timeout=20.0)
    hub.inject(faults.hang(seconds=0.5), path=INFO)
    plans = asyncio.gather(*(downloads.plan(NAME) for _ in range(5)))
    most = 0
    while not plans.done():
        most = max(most, len(children()))
        await asyncio.sleep(0.05)
    assert len({plan.commit for plan in await plans}) == 1
    assert most == 2
    await downloads.close()


async def test_plans_do_not_wait_for_downloads(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "MAX_CHILDREN", 1)
    downloads = Downloads(cache, HubAccess(hub.url, retry=QUICK), stall_timeout=20.0)

    async def admit(plan: DownloadPlan) -> None:
        assert await downloads.plan(NAME) == plan

    await downloads.download(NAME, lambda _: None, admit=admit)
    await downloads.close()


async def test_a_download_that_is_cancelled_twice_leaves_nothing(
    downloads: Downloads, hub: Hub
) -> None:
    begun = asyncio.Event()

    async def admit(_plan: DownloadPlan) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(downloads.download(NAME, lambda _: None, admit=admit))
    async with asyncio.timeout(30):
        await begun.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await until_in_loop(lambda: children() == [] and not _processes())


def _processes() -> list[Process]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Process]
