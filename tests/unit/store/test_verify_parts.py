"""Verifications of a part: what was read before, and only what was asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from loaderd.server.store.verify import FileProblem, Verification, VerifyProgress, VerifyReport
from tests.unit.store.caches import COMMIT, SMALL_MODEL, MadeUpRepo, entry, made_up_repo

WEIGHTS = "model.safetensors"


@pytest.fixture
def repo(tmp_path: Path) -> MadeUpRepo:
    return made_up_repo(tmp_path / "hub")


def report_of(verification: Verification) -> VerifyReport:
    return verification.run(lambda _: None, threading.Event())


def test_what_was_read_since_it_was_last_written_need_not_be_read_again(repo: MadeUpRepo) -> None:
    folder = repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    known = report_of(Verification(repo.folder, COMMIT)).stamps
    assert known.keys() == {entry(name, content).digest for name, content in SMALL_MODEL.items()}

    def look() -> tuple[VerifyReport, int]:
        """A further report, and how many files it took to read."""
        updates: list[VerifyProgress | FileProblem] = []
        further = Verification(repo.folder, COMMIT, known=known)
        report = further.run(updates.append, threading.Event())
        last = [update for update in updates if isinstance(update, VerifyProgress)][-1]
        return report, last.total_files

    size = sum(map(len, SMALL_MODEL.values()))
    assert look() == (VerifyReport((), len(SMALL_MODEL), size, ()), 0)
    weights = folder / WEIGHTS
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # nobody can hide a change
    report, files_read = look()
    assert files_read == 1
    assert [found.path for found in report.problems] == [WEIGHTS]


def test_only_the_files_that_were_asked_for_are_read(repo: MadeUpRepo) -> None:
    repo.add({**SMALL_MODEL, "README.md": b"hello"})
    repo.blob("README.md").write_bytes(b"HELLO")
    verification = Verification(repo.folder, COMMIT, paths=[WEIGHTS, "config.json"])
    report = report_of(verification)
    assert (report.problems, report.verified_files) == ((), 2)
