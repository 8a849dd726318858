"""A daemon with the real model, and a hub that serves it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loaderd.client import Client, Model
from tests.daemon import SpawnedDaemon


@pytest.fixture(scope="session")
def shared_daemon(
    tmp_path_factory: pytest.TempPathFactory, real_model: Path, tiny_model: Path
) -> Iterator[SpawnedDaemon]:
    """A daemon for tests that leave it as they found it: nothing loaded."""
    roots = ["--allow-local", str(real_model.parent), "--allow-local", str(tiny_model.parent)]
    arguments = [*roots, "--http", "127.0.0.1:0"]
    with SpawnedDaemon(tmp_path_factory.mktemp("daemon"), arguments) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared_daemon: SpawnedDaemon) -> Iterator[SpawnedDaemon]:
    """The shared daemon; what a test leaves loaded is unloaded after it."""
    yield shared_daemon
    with Client(shared_daemon.address) as client:
        for model in client.models():
            model.unload(force=True)


@pytest.fixture
def client(daemon: SpawnedDaemon) -> Iterator[Client]:
    """A client of the shared daemon."""
    with Client(daemon.address) as client:
        yield client


@pytest.fixture
def model(client: Client, real_model: Path) -> Model:
    """The real model, loaded."""
    return client.load(str(real_model))


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., SpawnedDaemon]]:
    """Starts daemons of the test's own, and ends them after it."""
    daemons: list[SpawnedDaemon] = []

    def start(*arguments: str, **environment: str) -> SpawnedDaemon:
        daemon = SpawnedDaemon(tmp_path, arguments, environment)
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.stop()
