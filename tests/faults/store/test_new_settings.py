"""A store that is given other settings while it works."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.server.errors import (
    CacheLimitError,
    LoaderdError,
    ModelNotAllowedError,
    ModelNotFoundError,
    ModelUnsupportedError,
    OfflineNotCachedError,
)
from loaderd.server.store.names import HubName
from loaderd.server.store.policy import ModelPolicy
from loaderd.server.store.store import ModelStore
from tests.faults.store.support import MODEL, NAME, NEEDED, contents, download, listed, settings
from tests.hub import Access, Hub, HubRepo

PRIVATE = HubName("org/private")
PICKLED = HubName("org/pickled")


async def test_the_next_download_goes_by_them(hub: Hub, cache: Path, store: ModelStore) -> None:
    hub.add(private := HubRepo("org/private", access=Access.PRIVATE, token="hf_new"))
    private.commit(MODEL)
    refusals: list[tuple[dict[str, object], type[LoaderdError]]] = [
        ({"hub_token": "hf_old"}, ModelNotFoundError),
        ({"offline": True}, OfflineNotCachedError),
        ({"policy": ModelPolicy(deny=("org/*",))}, ModelNotAllowedError),
        ({"hub_token": "hf_new", "max_bytes": 1000}, CacheLimitError),
    ]
    for changes, error in refusals:
        store.apply(settings(hub, cache, **changes))
        with pytest.raises(error):
            await download(store, PRIVATE)
    store.apply(settings(hub, cache, hub_token="hf_new"))
    snapshot = await download(store, PRIVATE)
    assert contents(snapshot.path) == {path: MODEL[path] for path in NEEDED}


async def test_what_a_listing_said_is_asked_again(hub: Hub, cache: Path, store: ModelStore) -> None:
    hub.add(pickled := HubRepo("org/pickled"))
    pickled.commit({path: MODEL[path] for path in MODEL if path != "model.safetensors"})
    with pytest.raises(ModelUnsupportedError):
        await download(store, PICKLED)
    allowed = settings(hub, cache, allow_pickle=frozenset({"org/pickled"}))
    store.apply(allowed)
    await download(store, PICKLED)
    assert [each.complete for each in await listed(store)] == [True]
    store.apply(settings(hub, cache))
    assert [each.complete for each in await listed(store)] == [False]
    with pytest.raises(ModelUnsupportedError):
        await store.look_up(PICKLED, refresh=False)
    store.apply(allowed)
    assert [each.complete for each in await listed(store)] == [True]
    assert await download(store, NAME)
