from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from loaderd.server.store.store import ModelStore
from tests.faults.store.support import MODEL, children, settings
from tests.hub import Hub, HubRepo


@pytest.fixture
def repo() -> HubRepo:
    repo = HubRepo("org/model")
    repo.commit(MODEL)
    return repo


@pytest.fixture
def hub(repo: HubRepo) -> Iterator[Hub]:
    with Hub(repo) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that does not exist yet."""
    return tmp_path / "home" / "hub"


@pytest.fixture
async def store(hub: Hub, cache: Path) -> AsyncIterator[ModelStore]:
    store = ModelStore(settings(hub, cache))
    await store.start()
    yield store
    await store.close()
    assert children() == []
