from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.daemon.box import QUICK, Box
from tests.hub import Hub


@contextmanager
def _shared_box(folder: Path, *arguments: str) -> Iterator[Box]:
    with (
        Hub() as hub,
        Box.running(folder, hub, (*QUICK, *arguments)) as box,
        Box.running(folder, hub, (*QUICK, "--offline")) as offline,
    ):
        yield replace(box, offline=offline.client)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A daemon and a hub for a whole module: each test has a repository of its own."""
    with _shared_box(tmp_path_factory.mktemp("box")) as box:
        yield box


@pytest.fixture(scope="module")
def impatient_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The same with a daemon that waits two and a half seconds for a silent hub."""
    with _shared_box(tmp_path_factory.mktemp("impatient"), "--stall-timeout", "2.5") as box:
        yield box


@pytest.fixture(autouse=True)
def healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test's faults meet the next one."""
    yield
    for name in ("box", "impatient_box"):
        if name in request.fixturenames:
            request.getfixturevalue(name).hub.heal()
