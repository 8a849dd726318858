"""A daemon with an empty cache, and a hub with a model in two versions and three small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loaderd.client import Client
from tests.daemon import SpawnedDaemon
from tests.hub import Hub, HubRepo, files_below
from tests.hub.tiny_models import build_tiny_model
from tests.integration.cache.small import small_repo


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path) -> Iterator[Hub]:
    """`org/tiny` in two versions of which `next` is newer, and three small ones."""
    other = build_tiny_model(tmp_path / "models" / "tiny", seed=1)
    tiny = HubRepo("org/tiny")
    tiny.commit(files_below(tiny_model))
    tiny.commit(files_below(other), branch="next")
    small = [small_repo(f"org/{name}", name.encode()) for name in "abc"]
    with Hub(tiny, *small) as hub:
        yield hub


@pytest.fixture
def daemon(hub: Hub, spawn: Callable[..., SpawnedDaemon]) -> SpawnedDaemon:
    return spawn("--standby", "0", HF_ENDPOINT=hub.url)


@pytest.fixture
def client(daemon: SpawnedDaemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client
