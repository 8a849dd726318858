"""A blob on its way, where the file system's locks do not keep two writers apart."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loaderd.server.store.partial_blob import PartialBlob

CONTENT = os.urandom(1000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def _start_over(other: PartialBlob) -> None:
    other.start_over()


def _write_wrong(other: PartialBlob) -> None:
    other.write(bytes(500))


def _write_more(other: PartialBlob) -> None:
    other.write(bytes(1000))


@pytest.mark.parametrize("disturb", [_start_over, _write_wrong, _write_more])
def test_what_another_spoils_is_not_taken_for_right(
    tmp_path: Path, disturb: Callable[[PartialBlob], None]
) -> None:
    path = tmp_path / f"{DIGEST}.incomplete"
    with PartialBlob(path, 1000, DIGEST) as ours, PartialBlob(path, 1000, DIGEST) as other:
        ours.write(CONTENT[:600])
        time.sleep(0.02)  # the clock of files ticks seldom
        disturb(other)
        ours.write(CONTENT[600:])
        assert (ours.found == DIGEST) == (path.read_bytes() == CONTENT)


def test_two_that_write_the_same_are_both_right(tmp_path: Path) -> None:
    path = tmp_path / f"{DIGEST}.incomplete"
    with PartialBlob(path, 1000, DIGEST) as ours, PartialBlob(path, 1000, DIGEST) as other:
        for start in (0, 300):
            for each in (ours, other):
                each.write(CONTENT[start:][: 300 if not start else 700])
        assert ours.found == other.found == DIGEST
