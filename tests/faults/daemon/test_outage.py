"""A hub that goes away: what the cache has is served, and said to be old."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loaderd.client import Snapshot, errors
from tests.faults.daemon.box import MODEL, NEEDED, QUICK, WEIGHTS, Box, contents
from tests.faults.daemon.cases import FILE, GATED, INFO, UNREACHABLE
from tests.faults.daemon.checks import fails, nothing_half_done
from tests.faults.daemon.library import plain_download
from tests.hub import Hub, HubRepo, faults
from tests.hub.faults import Fault
from tests.unit.store.caches import safetensors
from tests.waiting import until

NEXT = {**MODEL, WEIGHTS: safetensors(3_000_000, b"\xa5")}
HALF = len(MODEL[WEIGHTS]) // 2


@pytest.fixture
def repo() -> HubRepo:
    repo = HubRepo("org/model")
    repo.commit(MODEL)
    return repo


@pytest.fixture
def own_box(tmp_path: Path, repo: HubRepo) -> Iterator[Box]:
    """A box whose hub can be stopped."""
    with Hub(repo) as hub, Box.running(tmp_path, hub) as box:
        yield box


def test_a_hub_that_goes_away_for_good_in_mid_download(own_box: Box, repo: HubRepo) -> None:
    box, hub = own_box, own_box.hub
    surroundings = box.disk.surroundings(repo.id)
    kept = _goes_away_in_mid_download(box, errors.HubUnreachableError)
    assert kept == HALF

    hub.start()
    nothing_half_done(box, repo.id, surroundings)
    assert contents(box.client.cache.download(repo.id).path) == NEEDED
    assert hub.requests[-1].range == f"bytes={kept}-"


def test_a_hub_that_goes_away_in_mid_update_leaves_the_last_good_snapshot(
    own_box: Box, repo: HubRepo
) -> None:
    box, hub = own_box, own_box.hub
    first = box.client.cache.download(repo.id)
    assert not first.stale
    repo.commit(NEXT)
    _goes_away_in_mid_download(box, None)

    for _ in range(2):
        served = box.client.cache.download(repo.id)
        assert (served.commit, served.stale, served.complete) == (first.commit, True, True)
        assert contents(served.path) == NEEDED
    resolved = box.client.cache.resolve(repo.id)
    assert isinstance(resolved, Snapshot)
    assert resolved.commit == first.commit
    assert box.disk.refs(repo.id) == {"main": first.commit}

    hub.start()
    fresh = box.client.cache.download(repo.id)
    assert (fresh.stale, fresh.commit == first.commit) == (False, False)
    assert contents(fresh.path)[WEIGHTS] == NEXT[WEIGHTS]


def _goes_away_in_mid_download(box: Box, error: type[errors.LoaderdError] | None) -> int:
    """Stops the hub when half of the weights have come; how much of them is kept."""
    box.hub.inject(faults.hang(after_bytes=HALF), path=FILE)
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(box.client.cache.download, "org/model")
        until(lambda: HALF in box.disk.unfinished("org/model").values())
        box.hub.stop()
        if error is None:
            assert download.result(30).stale
        else:
            assert isinstance(download.exception(30), error)
    box.hub.heal()
    (kept,) = box.disk.unfinished("org/model").values()
    return kept


OUTAGES: dict[str, tuple[Fault, str]] = {
    "500 on info": (faults.status(500), INFO),
    "429 on info": (faults.status(429), INFO),
    "reset on info": (faults.reset(after_bytes=0), INFO),
    "503 on file": (faults.status(503), FILE),
}


@pytest.mark.parametrize(("fault", "where"), OUTAGES.values(), ids=OUTAGES)
def test_an_update_that_fails_serves_the_last_good_snapshot_as_stale(
    box: Box, fault: Fault, where: str
) -> None:
    repo_id = box.publish()
    first = box.client.cache.download(repo_id)
    repo = HubRepo(repo_id)
    repo.commit(MODEL)
    repo.commit(NEXT)
    box.hub.add(repo)
    box.hub.inject(fault, path=where)
    served = box.client.cache.download(repo_id)
    assert (served.commit, served.stale) == (first.commit, True)
    assert contents(served.path) == NEEDED

    box.hub.heal()
    fresh = box.client.cache.download(repo_id)
    assert not fresh.stale
    assert contents(fresh.path)[WEIGHTS] == NEXT[WEIGHTS]
    states = {s.commit: s.complete for s in box.client.cache.snapshots() if s.repo_id == repo_id}
    assert states == {first.commit: True, fresh.commit: True}


def test_an_update_whose_bytes_are_wrong_fails_and_leaves_the_last_good_snapshot(
    box: Box,
) -> None:
    repo_id = box.publish()
    first = box.client.cache.download(repo_id)
    repo = HubRepo(repo_id)
    repo.commit(MODEL)
    repo.commit(NEXT)
    box.hub.add(repo)
    box.hub.inject(faults.wrong_bytes(offset=2_000_000), path=FILE)
    with pytest.raises(errors.SnapshotCorruptError):
        box.client.cache.download(repo_id)
    resolved = box.client.cache.resolve(repo_id)
    assert isinstance(resolved, Snapshot)
    assert resolved.commit == first.commit
    assert box.disk.refs(repo_id) == {"main": first.commit}


def test_what_the_hub_denies_is_not_served_from_the_cache(box: Box) -> None:
    repo_id = box.publish()
    box.client.cache.download(repo_id)
    box.hub.inject(faults.status(403, {"X-Error-Code": "GatedRepo"}), path=INFO)
    fails(box, repo_id, GATED)


def test_a_ref_that_another_program_moved_and_did_not_fill(own_box: Box, repo: HubRepo) -> None:
    """The hub library writes the ref before the files come."""
    box, hub = own_box, own_box.hub
    first = box.client.cache.download(repo.id)
    commit = repo.commit(NEXT)
    hub.inject(faults.status(500), path=FILE)
    assert plain_download(hub.url, box.disk.cache, repo.id).returncode != 0
    assert box.disk.refs(repo.id) == {"main": commit}

    hub.stop()
    served = box.client.cache.download(repo.id)
    assert (served.commit, served.stale) == (first.commit, True)
    assert contents(served.path) == NEEDED

    hub.heal()
    hub.start()
    assert contents(box.client.cache.download(repo.id).path)[WEIGHTS] == NEXT[WEIGHTS]


def test_offline_what_is_cached_is_served_and_the_hub_is_never_asked(
    own_box: Box, repo: HubRepo
) -> None:
    first = own_box.client.cache.download(repo.id)
    asked = len(own_box.hub.requests)
    arguments = (*QUICK, "--offline")
    with Box.running(own_box.disk.folder, own_box.hub, arguments) as box:
        served = box.client.cache.download(repo.id)
        assert (served.commit, served.stale) == (first.commit, True)
        with pytest.raises(errors.OfflineNotCachedError) as caught:
            box.client.cache.download("org/other")
        assert "--offline" in str(caught.value)
    assert len(own_box.hub.requests) == asked


def test_a_hub_that_is_not_there_and_nothing_is_cached(own_box: Box, repo: HubRepo) -> None:
    surroundings = own_box.disk.surroundings(repo.id)
    own_box.hub.stop()
    fails(own_box, repo.id, UNREACHABLE)
    own_box.hub.start()
    nothing_half_done(own_box, repo.id, surroundings)
    assert contents(own_box.client.cache.download(repo.id).path) == NEEDED
