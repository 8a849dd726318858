"""A fake daemon for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from loaderd.client import Client
from tests.fake_daemon import FakeDaemon
from tests.unit.client.ctl import Ctl, ctl_for
from tests.unit.client.terminal import Spawn, Terminal


@pytest.fixture(autouse=True)
def _no_address_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "DAEMON", "TOKEN"):
        monkeypatch.delenv(f"LOADERD_{name}", raising=False)


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon() as daemon:
        yield daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


@pytest.fixture
def ctl(daemon: FakeDaemon) -> Ctl:
    """Runs `loaderctl` against the fake daemon."""
    return ctl_for(daemon.address)


@pytest.fixture
def spawn(daemon: FakeDaemon) -> Iterator[Spawn]:
    """Starts `loaderctl` under a pseudo-terminal."""
    with ExitStack() as stack:

        def start(*args: str, columns: int = 120) -> Terminal:
            terminal = Terminal("--address", daemon.address, *args, columns=columns)
            return stack.enter_context(terminal)

        yield start
