"""The download child: it can be killed at any time, leaves no litter and tells no secrets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from loaderd.server.errors import CacheNotWritableError, DownloadInterruptedError, DrainingError
from loaderd.server.store.names import HubName
from loaderd.server.store.store import CachedSnapshot, DownloadProgress, ModelStore, NotCached
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
    is_child,
    litter,
    partial_files,
    plan,
    ranges,
    settings,
)
from tests.hub import Hub, faults
from tests.unit.store.caches import write_folder
from tests.waiting import until


@pytest.fixture
def slow(hub: Hub) -> Hub:
    """The weights stop coming in the middle."""
    hub.inject(faults.hang(after_bytes=2_200_000), path=WEIGHTS)
    return hub


@asynccontextmanager
async def midway(store: ModelStore) -> AsyncIterator[asyncio.Task[CachedSnapshot]]:
    """A download that has brought a part of the weights."""
    under_way = asyncio.Event()

    def look(progress: DownloadProgress) -> None:
        if progress.downloaded_bytes > 1 << 20:
            under_way.set()

    task = asyncio.create_task(download(store, on_progress=look))
    async with asyncio.timeout(20):
        await under_way.wait()
    yield task


async def test_cancelling_kills_the_child_and_keeps_what_came(
    store: ModelStore, slow: Hub, cache: Path
) -> None:
    async with midway(store) as task:
        assert len(children()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert children() == []
    (partial,) = partial_files(cache)
    assert litter(cache) == []
    assert isinstance(await store.resolve(NAME), NotCached)
    slow.heal()
    came = partial.stat().st_size
    before = len(gets(slow))
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}
    assert len(gets(slow)) == before + 1  # the small files had come
    assert ranges(slow)[-1] == f"bytes={came}-"
    assert partial_files(cache) == []


async def test_a_waiter_that_leaves_does_not_stop_the_others(store: ModelStore, hub: Hub) -> None:
    hub.inject(faults.hang(after_bytes=2_200_000, seconds=1), path=WEIGHTS)
    async with midway(store) as stays:
        leaves = asyncio.create_task(download(store))
        await asyncio.sleep(0.1)
        leaves.cancel()
        assert isinstance(await stays, CachedSnapshot)
    assert gets(hub) == sorted(NEEDED)


async def test_a_child_that_is_killed_fails_its_download_and_nothing_else(
    store: ModelStore, slow: Hub, cache: Path
) -> None:
    async with midway(store) as task:
        children()[0].kill()
        with pytest.raises(DownloadInterruptedError) as caught:
            await task
        assert caught.value.model == "org/model"
    assert len(partial_files(cache)) == 1
    assert litter(cache) == []
    slow.heal()
    assert isinstance(await download(store), CachedSnapshot)


async def test_closing_the_store_ends_its_downloads_and_refuses_more(
    store: ModelStore, slow: Hub, cache: Path
) -> None:
    async with midway(store) as task:
        await store.close()
        assert children() == []
        with pytest.raises(DrainingError):
            await task
    assert litter(cache) == []
    with pytest.raises(DrainingError):
        await download(store)
    assert children() == []


async def test_the_token_is_nowhere_to_be_seen(
    slow: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LOADERD_HUB_TOKEN"):
        monkeypatch.setenv(variable, "hf_very_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # is passed on
    store = ModelStore(settings(slow, cache, hub_token="hf_very_secret"))
    assert "hf_very_secret" not in repr(store.settings)
    async with midway(store) as task:
        (child,) = children()
        assert "hf_very_secret" not in " ".join(child.cmdline())
        environment = child.environ()
        assert "hf_very_secret" not in str(environment)
        assert environment["HTTPS_PROXY"] == "http://127.0.0.1:9"
        assert environment["HF_ENDPOINT"] == slow.url
        assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert {request.token for request in slow.requests} == {"hf_very_secret"}
        task.cancel()
    await store.close()


_DAEMON = """
import asyncio, sys
from pathlib import Path
from loaderd.server.store.names import HubName
from loaderd.server.store.store import ModelStore, StoreSettings

async def main():
    store = ModelStore(StoreSettings(Path(sys.argv[1]), hub_endpoint=sys.argv[2]))
    async with store.download(HubName("org/model")) as flight:
        async for state in flight.progress():
            if state.progress.downloaded_bytes > 1 << 20:
                print("midway", flush=True)
        await flight.result()

asyncio.run(main())
"""


async def test_a_child_dies_with_its_daemon_and_the_next_one_goes_on(
    store: ModelStore, slow: Hub, cache: Path
) -> None:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _DAEMON, cache, slow.url, stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    async with asyncio.timeout(20):
        assert await daemon.stdout.readline() == b"midway\n"
    (child,) = (p for p in psutil.Process(daemon.pid).children(recursive=True) if is_child(p))
    daemon.kill()
    await daemon.communicate()
    until(lambda: not is_child(child))
    (partial,) = partial_files(cache)
    await store.start()
    came = partial.stat().st_size
    slow.heal()
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}
    assert ranges(slow)[-1] == f"bytes={came}-"
    assert partial_files(cache) == litter(cache) == []


@pytest.mark.parametrize("obstacle", ["models--org--model", ".locks", "models--org--model/blobs"])
async def test_a_cache_that_cannot_be_written_to_is_said(
    store: ModelStore, cache: Path, obstacle: str
) -> None:
    write_folder(cache, {obstacle: b"a file is in the way"})
    with pytest.raises(CacheNotWritableError) as caught:
        await download(store)
    assert caught.value.problem in {"Not a directory", "File exists"}
    (cache / obstacle).unlink()
    assert isinstance(await download(store), CachedSnapshot)


async def test_a_cache_that_cannot_be_made_is_said(store: ModelStore, cache: Path) -> None:
    write_folder(cache.parent, {cache.name: b"a file is in the way"})
    with pytest.raises(CacheNotWritableError):
        await download(store)


async def test_names_of_other_people_do_not_wait_for_each_other(
    store: ModelStore, slow: Hub, cache: Path
) -> None:
    async with midway(store) as task:
        found_now = await plan(store, HubName("org/model"))
        (weights,) = (file for file in found_now.files if not file.cached)
        assert weights.path == "model.safetensors"
        assert found_now.missing_bytes == weights.size_bytes - weights.partial_bytes
        assert weights.partial_bytes > 0
        task.cancel()
    assert found(cache, "*/refs/*") == []
