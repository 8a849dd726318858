"""The daemon that random requests are sent to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from loaderd.client import Client
from tests.daemon import SpawnedDaemon
from tests.hub.tiny_models import build_tiny_model
from tests.integration.fuzz.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Target]:
    """A daemon of the tests' own: offline, with a tiny model that a lease holds."""
    folder = tmp_path_factory.mktemp("fuzz")
    other = build_tiny_model(folder / "models" / "other", seed=1)
    roots = ["--allow-local", str(tiny_model), "--allow-local", str(other)]
    options = [("grpc.max_receive_message_length", -1)]
    with (
        SpawnedDaemon(folder, ["--offline", "--http", "127.0.0.1:0", *roots]) as daemon,
        grpc.insecure_channel(daemon.address, options) as channel,
        Client(daemon.address) as client,
        client.lease(str(tiny_model), ttl=86_400) as lease,
    ):
        yield Target(daemon, channel, client, lease, other)
