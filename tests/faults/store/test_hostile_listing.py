"""Listings that would cost more than they say: bytes, depth, files."""

from __future__ import annotations

import gzip
import threading
from pathlib import Path

import pytest

from loaderd.server.errors import HubUnreachableError, ModelUnsupportedError
from loaderd.server.store import hub as hub_functions
from loaderd.server.store import hub_guard, hub_listing
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.store import ModelStore
from tests.faults.store.support import INFO, MODEL, NAME, NEEDED, QUICK, TREE, plan
from tests.hub import Hub, Response, faults


async def test_an_answer_that_grows_when_it_is_unpacked_is_refused(
    store: ModelStore, hub: Hub
) -> None:
    def packed(response: Response, _stopped: threading.Event) -> Response:
        large = b" " * hub_guard.MAX_ANSWER_BYTES + b"".join(response.body)
        body = gzip.compress(large, compresslevel=1)
        return Response.text(200, body, "application/json", {"Content-Encoding": "gzip"})

    hub.inject(packed, path=INFO)
    with pytest.raises(HubUnreachableError):
        await plan(store)


async def test_an_answer_of_endless_depth_is_refused(store: ModelStore, hub: Hub) -> None:
    for path in (INFO, TREE):
        hub.heal()
        hub.inject(faults.status(200, body=b"[" * 200_000), path=path)
        with pytest.raises(HubUnreachableError):
            await plan(store)


def test_a_repository_of_too_many_files_is_not_taken_for_a_smaller_one(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = HubAccess(hub.url, retry=QUICK)
    monkeypatch.setattr(hub_listing, "MAX_FILES", len(MODEL))
    assert len(hub_functions.plan(NAME, cache, access).files) == len(NEEDED)
    monkeypatch.setattr(hub_listing, "MAX_FILES", len(MODEL) - 1)
    with pytest.raises(ModelUnsupportedError):
        hub_functions.plan(NAME, cache, access)
