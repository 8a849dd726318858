"""A disk that is full: refused before the download starts, or stopped with nothing to see of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loaderd.client import errors
from loaderd.server.store.hub_download import DISK_MARGIN_BYTES
from tests.faults.daemon.box import MODEL, NEEDED, WEIGHTS, Box, contents
from tests.faults.daemon.cases import FILE, TREE, weights_listed_with
from tests.faults.daemon.checks import nothing_half_done
from tests.faults.daemon.disk import Disk
from tests.hub import Hub, faults
from tests.waiting import until

TOTAL = sum(map(len, NEEDED.values()))
HALF = len(MODEL[WEIGHTS]) // 2
SIZE = DISK_MARGIN_BYTES + 8_000_000

# A file system of its own, which only the daemon has and which goes with it; no rights are needed
# where users may have name spaces.
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
_MOUNT = f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && exec "$@"'


@pytest.fixture
def small_disk_box(tmp_path: Path) -> Iterator[Box]:
    """A daemon whose cache is on a small disk; `Box.disk` is that as the daemon sees it."""
    home = tmp_path / "home"
    home.mkdir()
    wrapper = (*_UNSHARE, "sh", "-c", _MOUNT, str(home))
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this box lets nobody mount a file system of his own")
    with Hub() as hub, Box.running(tmp_path, hub, wrapper=wrapper) as box:
        root = Path(f"/proc/{box.daemon.process.pid}/root")
        seen = root / home.relative_to("/")
        yield replace(box, disk=Disk(seen, seen / "hub"))


def _fill(disk: Disk) -> Path:
    """Takes all that is free."""
    ballast = disk.folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536):
                pass
        except OSError:
            pass
    return ballast


def test_a_model_that_does_not_fit_is_refused_before_it_starts(small_disk_box: Box) -> None:
    box = small_disk_box
    repo_id = box.publish()
    ballast = box.disk.folder / "ballast"
    ballast.write_bytes(b"\0" * 6_000_000)
    surroundings = box.disk.surroundings(repo_id)
    with pytest.raises(errors.DiskFullError) as caught:
        box.client.cache.download(repo_id)
    error = caught.value
    assert error.code is errors.DiskFullError.code
    assert error.needed_bytes == TOTAL + DISK_MARGIN_BYTES
    assert error.free_bytes is not None
    assert 0 < error.free_bytes < error.needed_bytes
    assert box.fetches(repo_id) == []
    nothing_half_done(box, repo_id, surroundings)

    ballast.unlink()
    assert box.client.cache.download(repo_id).complete


def test_a_model_of_an_absurd_size_is_refused_before_it_starts(box: Box) -> None:
    repo_id = box.publish()
    surroundings = box.disk.surroundings(repo_id)
    box.hub.inject(weights_listed_with(size=1 << 60), path=TREE)
    with pytest.raises(errors.DiskFullError) as caught:
        box.client.cache.download(repo_id)
    assert caught.value.needed_bytes is not None
    assert caught.value.needed_bytes > 1 << 60
    assert box.fetches(repo_id) == []

    box.hub.heal()
    nothing_half_done(box, repo_id, surroundings)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED


def test_a_disk_that_fills_up_in_mid_download(small_disk_box: Box) -> None:
    box = small_disk_box
    repo_id = box.publish()
    surroundings = box.disk.surroundings(repo_id)
    box.hub.inject(faults.hang(after_bytes=HALF, seconds=1), path=FILE, times=1)
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(box.client.cache.download, repo_id)
        until(lambda: HALF in box.disk.unfinished(repo_id).values())
        ballast = _fill(box.disk)
        error = download.exception(30)
    assert isinstance(error, errors.DiskFullError)
    assert error.needed_bytes is not None
    assert error.free_bytes is not None
    assert error.free_bytes < error.needed_bytes
    ballast.unlink()
    nothing_half_done(box, repo_id, surroundings)

    snapshot = box.client.cache.download(repo_id)
    assert snapshot.complete
    folder = box.disk.repo(repo_id) / "snapshots" / snapshot.commit
    assert contents(str(folder)) == NEEDED
