"""What an interrupted download left is gone on with if it is good, and fetched again if not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from loaderd.client import DownloadProgress
from tests.faults.daemon.box import NEEDED, WEIGHTS, Box, contents
from tests.faults.daemon.cases import CORRUPT_WEIGHTS, FILE
from tests.faults.daemon.checks import fails
from tests.hub import faults
from tests.hub.faults import Fault

WHOLE = NEEDED[WEIGHTS]
HALF = len(WHOLE) // 2
DIGEST = hashlib.sha256(WHOLE).hexdigest()


@pytest.fixture
def repo_id(box: Box) -> str:
    return box.publish()


def leave(box: Box, repo_id: str, content: bytes) -> Path:
    """Puts an unfinished file where an interrupted download would have left it."""
    path = box.disk.repo(repo_id) / "blobs" / f"{DIGEST}.incomplete"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def download(box: Box, repo_id: str) -> DownloadProgress:
    """Downloads the right bytes; the last progress."""
    seen: list[DownloadProgress] = []
    snapshot = box.client.cache.download(repo_id, on_progress=seen.append)
    assert contents(snapshot.path) == NEEDED
    assert box.disk.unfinished(repo_id) == {}
    box.disk.check_contents(repo_id)
    return seen[-1]


def test_a_download_goes_on_from_the_bytes_that_came(box: Box, repo_id: str) -> None:
    leave(box, repo_id, WHOLE[:HALF])
    last = download(box, repo_id)
    (fetch,) = box.fetches(repo_id, WEIGHTS)
    assert fetch.range == f"bytes={HALF}-"
    assert (last.resumed_bytes, last.refetched_bytes) == (HALF, 0)


def test_a_file_that_only_lacked_its_name_is_not_fetched(box: Box, repo_id: str) -> None:
    leave(box, repo_id, WHOLE)
    download(box, repo_id)
    assert box.fetches(repo_id, WEIGHTS) == []


# What is there, how often the file is asked for, and what was in vain.
SPOILT: dict[str, tuple[bytes, int, int]] = {
    "half of another file": (b"\0" * HALF, 2, len(WHOLE)),
    "another file of this size": (b"\0" * len(WHOLE), 1, len(WHOLE)),
    "a longer file": (WHOLE + b"\0", 1, 0),
}


@pytest.mark.parametrize(("content", "asked", "refetched"), SPOILT.values(), ids=SPOILT)
def test_what_is_not_the_files_content_is_fetched_again(
    box: Box, repo_id: str, content: bytes, asked: int, refetched: int
) -> None:
    leave(box, repo_id, content)
    last = download(box, repo_id)
    fetches = box.fetches(repo_id, WEIGHTS)
    assert len(fetches) == asked
    assert fetches[-1].range is None
    assert (last.resumed_bytes, last.refetched_bytes) == (0, refetched)


ANSWERS: dict[str, Fault] = {
    "the whole file": faults.status(200, body=WHOLE),
    "416": faults.status(416, {"Content-Range": f"bytes */{len(WHOLE)}"}),
    "no range": faults.alter_headers(content_range=None),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_hub_that_does_not_go_on_in_mid_file(box: Box, repo_id: str, answer: Fault) -> None:
    leave(box, repo_id, WHOLE[:HALF])
    box.hub.inject(answer, path=FILE, times=1)
    download(box, repo_id)


def test_a_hub_that_goes_on_elsewhere_is_refused(box: Box, repo_id: str) -> None:
    partial = leave(box, repo_id, WHOLE[:HALF])
    box.hub.inject(faults.alter_headers(content_range=f"bytes 0-9/{len(WHOLE)}"), path=FILE)
    fails(box, repo_id, CORRUPT_WEIGHTS)
    assert partial.read_bytes() == WHOLE[:HALF]

    box.hub.heal()
    download(box, repo_id)
    assert box.fetches(repo_id, WEIGHTS)[-1].range == f"bytes={HALF}-"
