"""A disk that fills up: refused before the download, or stopped without a trace."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loaderd.server.errors import CacheNotWritableError, DiskFullError
from loaderd.server.store.hub_download import DISK_MARGIN_BYTES
from loaderd.server.store.names import HubName
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    WEIGHTS,
    download,
    found,
    gets,
    litter,
    partial_files,
    settings,
)
from tests.hub import Hub, HubRepo, faults
from tests.unit.store.caches import SMALL_MODEL, index, safetensors

SIZE = DISK_MARGIN_BYTES + 8_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode != 0:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], timeout=30, check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], timeout=30, check=True)


def fill(disk: Path) -> Path:
    """Takes all that is free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536):
                pass
        except OSError:
            pass
    return ballast


async def test_a_disk_with_too_little_room_is_not_written_to(hub: Hub, disk: Path) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * 6_000_000)
    store = ModelStore(settings(hub, disk / "hub"))
    with pytest.raises(DiskFullError) as caught:
        await download(store)
    missing = sum(len(MODEL[name]) for name in NEEDED)
    assert caught.value.needed_bytes == missing + DISK_MARGIN_BYTES
    assert caught.value.free_bytes < caught.value.needed_bytes
    assert gets(hub) == []
    assert found(disk / "hub", "*") == []
    ballast.unlink()
    assert isinstance(await download(store), CachedSnapshot)
    await store.close()


async def test_a_disk_that_is_full_keeps_nothing_of_any_file(hub: Hub, disk: Path) -> None:
    names = [f"model-{n}-of-2.safetensors" for n in (1, 2)]
    shards = {name: safetensors(3_000_000, name.encode()[6:7]) for name in names}
    repo = HubRepo("org/sharded")
    repo.commit({**SMALL_MODEL, "model.safetensors": None})
    repo.commit({**shards, "model.safetensors.index.json": index(*names)})
    hub.add(repo)
    hub.inject(faults.hang(after_bytes=1_200_000), path="*/model-1-*")
    hub.inject(faults.hang(after_bytes=1_200_000, seconds=2), path="*/model-2-*")
    store = ModelStore(settings(hub, disk / "hub"))
    under_way = asyncio.Event()
    task = asyncio.create_task(
        download(
            store,
            HubName("org/sharded"),
            lambda p: under_way.set() if p.downloaded_bytes > 2_000_000 else None,
        )
    )
    async with asyncio.timeout(20):
        await under_way.wait()
    assert len(partial_files(disk)) == 2
    fill(disk)
    with pytest.raises(DiskFullError):
        await task
    assert partial_files(disk) == litter(disk) == []
    await store.close()


async def test_a_cache_on_a_read_only_disk_is_said(hub: Hub, disk: Path) -> None:
    store = ModelStore(settings(hub, disk / "hub"))
    remount(disk, "ro")
    with pytest.raises(CacheNotWritableError) as caught:
        await download(store)
    assert caught.value.problem == "Read-only file system"
    remount(disk, "rw")
    assert isinstance(await download(store), CachedSnapshot)
    await store.close()


async def test_a_disk_that_fills_up_meanwhile_stops_the_download(hub: Hub, disk: Path) -> None:
    hub.inject(faults.hang(after_bytes=1_200_000, seconds=1), path=WEIGHTS, times=1)
    store = ModelStore(settings(hub, disk / "hub"))
    under_way = asyncio.Event()
    task = asyncio.create_task(
        download(
            store,
            on_progress=lambda p: under_way.set() if p.downloaded_bytes > 1_000_000 else None,
        )
    )
    async with asyncio.timeout(20):
        await under_way.wait()
    ballast = fill(disk)
    with pytest.raises(DiskFullError) as caught:
        await task
    assert caught.value.free_bytes < caught.value.needed_bytes
    assert partial_files(disk) == []
    assert isinstance(await store.resolve(NAME), NotCached)
    ballast.unlink()
    assert isinstance(await download(store), CachedSnapshot)
    await store.close()


async def test_a_disk_without_room_for_the_cache_itself_is_said(hub: Hub, disk: Path) -> None:
    remount(disk, "nr_inodes=1")
    store = ModelStore(settings(hub, disk / "hub"))
    with pytest.raises(CacheNotWritableError) as caught:
        await download(store)
    assert caught.value.problem == "No space left on device"
    await store.close()
