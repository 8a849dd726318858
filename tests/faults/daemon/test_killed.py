"""kill -9 of the download child and of the daemon in mid-download, and two daemons on one cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loaderd.client import Snapshot, errors
from tests.faults.daemon.box import MODEL, NEEDED, WEIGHTS, Box, contents
from tests.faults.daemon.cases import FILE
from tests.faults.daemon.checks import nothing_half_done
from tests.hub import Hub, HubRepo, faults
from tests.waiting import until

HALF = len(MODEL[WEIGHTS]) // 2


@pytest.fixture
def hub() -> Iterator[Hub]:
    repo = HubRepo("org/model")
    repo.commit(MODEL)
    with Hub(repo) as hub:
        yield hub


@contextmanager
def _midway(box: Box) -> Iterator[Future[Snapshot]]:
    """A download of which half of the weights has come and no more comes."""
    box.hub.inject(faults.hang(after_bytes=HALF), path=FILE)
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(box.client.cache.download, "org/model")
        until(lambda: HALF in box.disk.unfinished("org/model").values())
        yield download
    box.hub.heal()


def _goes_on(box: Box) -> None:
    """A retry brings the rest, and only the rest."""
    asked = len(box.hub.requests)
    assert contents(box.client.cache.download("org/model").path) == NEEDED
    fetches = [each for each in box.hub.requests[asked:] if "/resolve/" in each.path]
    assert [each.range for each in fetches] == [f"bytes={HALF}-"]
    assert fetches[0].sent_bytes == len(NEEDED[WEIGHTS]) - HALF


def test_a_child_that_is_killed(hub: Hub, tmp_path: Path) -> None:
    with Box.running(tmp_path, hub) as box:
        surroundings = box.disk.surroundings("org/model")
        with _midway(box) as download:
            (child,) = box.daemon.download_children()
            child.kill()
            error = download.exception(30)
        assert isinstance(error, errors.DownloadInterruptedError)
        assert (error.code, error.model) == (errors.DownloadInterruptedError.code, "org/model")
        assert error.retry_after
        nothing_half_done(box, "org/model", surroundings)
        _goes_on(box)


def test_a_daemon_that_is_killed(hub: Hub, tmp_path: Path) -> None:
    with Box.running(tmp_path, hub) as box:
        with _midway(box) as download:
            (child,) = box.daemon.download_children()
            box.daemon.process.kill()
            assert isinstance(download.exception(30), errors.DaemonUnreachableError)
        until(lambda: not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE)
    surroundings = None
    with Box.running(tmp_path, hub) as box:
        surroundings = box.disk.surroundings("org/model")
        nothing_half_done(box, "org/model", surroundings)
        _goes_on(box)


def test_two_daemons_that_download_one_model_into_one_cache(hub: Hub, tmp_path: Path) -> None:
    hub.inject(faults.throttle(len(MODEL[WEIGHTS])), path=FILE)
    with (
        Box.running(tmp_path, hub) as first,
        Box.running(tmp_path, hub) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        downloads = [pool.submit(box.client.cache.download, "org/model") for box in (first, second)]
        one, other = (each.result(60) for each in downloads)
        assert one.path == other.path
        assert one.complete
        assert other.complete
        assert contents(one.path) == NEEDED
        names = [each.path.rpartition("/")[2] for each in first.fetches("org/model")]
        assert sorted(names) == sorted(NEEDED)
        first.disk.check_contents("org/model")
