"""Models that the operator does not allow: refused before the hub is asked, or anything fetched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loaderd.server.errors import ModelNotAllowedError, ModelTooLargeError
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.policy import ModelPolicy
from loaderd.server.store.store import LocalFolder, ModelStore
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    contents,
    download,
    found,
    gets,
    settings,
)
from tests.hub import Hub

ALLOWED = [
    ModelPolicy(),
    ModelPolicy(allow=("org/*",)),
    ModelPolicy(allow=("other/*", "org/model")),
    ModelPolicy(deny=("other/*", "org/mode", "model")),
]
REFUSED = [
    ModelPolicy(allow=("other/*",)),
    ModelPolicy(allow=("Org/*",)),
    ModelPolicy(allow=("org/*",), deny=("org/model",)),
    ModelPolicy(deny=("*",)),
    ModelPolicy(deny=("ORG/*",)),
]


@asynccontextmanager
async def store_with(hub: Hub, cache: Path, policy: ModelPolicy) -> AsyncIterator[ModelStore]:
    store = ModelStore(settings(hub, cache, policy=policy, local_roots=(cache.parent,)))
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("policy", ALLOWED, ids=repr)
async def test_what_is_allowed_is_asked_for(hub: Hub, cache: Path, policy: ModelPolicy) -> None:
    async with store_with(hub, cache, policy) as store:
        assert await store.look_up(NAME, refresh=True)
    assert hub.requests


async def _verify(store: ModelStore) -> None:
    async for _ in store.verify(NAME, repair=True):
        pass


WAYS: dict[str, Callable[[ModelStore], Awaitable[object]]] = {
    "resolve": lambda store: store.resolve(NAME),
    "look up": lambda store: store.look_up(NAME, refresh=True),
    "commit": lambda store: store.resolve(HubName("org/model", "a" * 40)),
    "download": download,
    "repair": _verify,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_what_is_not_allowed_is_not_asked_for(
    hub: Hub, cache: Path, way: Callable[[ModelStore], Awaitable[object]]
) -> None:
    for policy in REFUSED:
        async with store_with(hub, cache, policy) as store:
            with pytest.raises(ModelNotAllowedError) as caught:
                await way(store)
            assert caught.value.model.startswith("org/model")
    assert hub.requests == []
    assert found(cache, "*") == []


async def test_a_cached_model_that_is_not_allowed_any_more_can_be_deleted_and_no_more(
    hub: Hub, cache: Path
) -> None:
    async with store_with(hub, cache, ModelPolicy()) as store:
        snapshot = await download(store)
        by_path = LocalName(snapshot.path)
        assert isinstance(await store.resolve(by_path), LocalFolder)
    async with store_with(hub, cache, ModelPolicy(deny=("org/*",))) as store:
        link = cache.parent / "link"
        link.symlink_to(snapshot.path)
        for name in (NAME, by_path, LocalName(link)):
            with pytest.raises(ModelNotAllowedError):
                await store.resolve(name)
        assert len((await store.snapshots()).snapshots) == 1


async def test_a_folder_that_is_not_allowed(hub: Hub, cache: Path) -> None:
    inside, beside = cache.parent / "models" / "a", cache.parent / "models-b"
    for folder in (inside, beside):
        folder.mkdir(parents=True)
        for name in NEEDED:
            (folder / name).write_bytes(MODEL[name])
    link = cache.parent / "link"
    link.symlink_to(inside)
    policy = ModelPolicy(deny=(str(inside.parent),))
    async with store_with(hub, cache, policy) as store:
        for path in (inside, link, beside / ".." / "models" / "a"):
            with pytest.raises(ModelNotAllowedError):
                await store.resolve(LocalName(path))
        assert isinstance(await store.resolve(LocalName(beside)), LocalFolder)


async def test_a_model_that_is_too_large_is_not_fetched(hub: Hub, cache: Path) -> None:
    size = sum(len(MODEL[name]) for name in NEEDED)
    async with store_with(hub, cache, ModelPolicy(max_bytes=size - 1)) as store:
        with pytest.raises(ModelTooLargeError) as caught:
            await download(store)
        assert (caught.value.size_bytes, caught.value.max_bytes) == (size, size - 1)
    assert gets(hub) == []
    assert found(cache, "*") == []
    async with store_with(hub, cache, ModelPolicy(max_bytes=size)) as store:
        snapshot = await download(store)
        assert contents(snapshot.path).keys() == NEEDED
    async with store_with(hub, cache, ModelPolicy(max_bytes=size - 1)) as store:
        for name in (NAME, LocalName(snapshot.path)):
            with pytest.raises(ModelTooLargeError):
                await store.resolve(name)
