"""The daemon's side of verifications, which read in threads; and what follows from them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from loaderd.server.errors import (
    HubRateLimitedError,
    HubUnreachableError,
    LoaderdError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.single_flight import Publish, SingleFlight
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.names import HubName
from loaderd.server.store.notes import note_hashed
from loaderd.server.store.plan import DownloadProgress, DownloadState
from loaderd.server.store.resolve import needed_files
from loaderd.server.store.verify import (
    FileProblem,
    ProblemKind,
    Verification,
    VerifyProgress,
    VerifyReport,
)

Fetch = Callable[[HubName, frozenset[str], Publish[DownloadState]], Awaitable[str]]
"""Brings a commit into the cache; the content of the given paths is known to be bad."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verified:
    """The end of a verification.

    Attributes:
        repo_id: The repository.
        commit: The snapshot's commit.
        report: What was found.
        repaired: Whether there were problems and all of them are mended.
    """

    repo_id: str
    commit: str
    report: VerifyReport
    repaired: bool


VerifyUpdate = VerifyProgress | FileProblem | DownloadProgress | Verified
"""What a verification says: a `DownloadProgress` is that of the repair."""


class Verifications:
    """Compares snapshots with their hashes, and mends what differs.

    Args:
        fetch: Fetches what is damaged.
        offline: The hub must not be asked.
    """

    def __init__(self, fetch: Fetch, *, offline: bool) -> None:
        self._fetch = fetch
        self._offline = offline
        self._repairs: SingleFlight[HubName, DownloadState, str] = SingleFlight()

    async def verify(
        self, repo: RepoFolder, commit: str, *, allow_pickle: bool, repair: bool
    ) -> AsyncGenerator[VerifyUpdate, None]:
        """Reads a whole snapshot; see `ModelStore.verify`."""
        read = partial(Verification, repo, commit, allow_pickle=allow_pickle)
        report = None
        async with aclosing(_run(repo, read())) as updates:
            async for update in updates:
                if isinstance(update, VerifyReport):
                    report = update
                else:
                    yield update
        if report is None:
            raise RuntimeError("a verification ended without a report")
        repaired = False
        if repair and report.problems:
            damaged = frozenset(problem.path for problem in report.problems)
            name = HubName(repo.repo_id, commit)
            async with self._repairs.join(name, partial(self._fetch, name, damaged)) as flight:
                async for state in flight.progress():
                    yield state.progress
                await flight.result()
            repaired = not (await _report(repo, read(paths=damaged))).problems
        yield Verified(repo.repo_id, commit, report, repaired)

    async def prove(
        self,
        repo: RepoFolder,
        commit: str,
        *,
        allow_pickle: bool,
        publish: Publish[VerifyProgress],
    ) -> None:
        """Makes sure that what loading needs is what its hashes say.

        A content that was hashed since it was last written is not read again. What is damaged is
        fetched again, once.

        Raises:
            SnapshotCorruptError, SnapshotIncompleteError: It is damaged, and the hub does not
                answer, must not be asked, or has no better.
            LoaderdError: The repair failed.
        """
        known = await asyncio.to_thread(records.hashed, repo)
        needed = await asyncio.to_thread(needed_files, repo, commit, allow_pickle=allow_pickle)
        read = partial(Verification, repo, commit, allow_pickle=allow_pickle)
        report = await _report(repo, read(paths=needed, known=known), publish)
        if not report.problems:
            return
        damage = _error(repo, report.problems[0])
        if self._offline:
            raise damage
        _log.warning("%s; fetching it again", damage)
        damaged = frozenset(problem.path for problem in report.problems)
        name = HubName(repo.repo_id, commit)
        try:
            async with self._repairs.join(name, partial(self._fetch, name, damaged)) as flight:
                await flight.result()
        except (HubUnreachableError, HubRateLimitedError) as error:
            raise damage from error
        for problem in (await _report(repo, read(paths=damaged))).problems:
            raise _error(repo, problem)


async def _run(
    repo: RepoFolder, verification: Verification
) -> AsyncGenerator[VerifyProgress | FileProblem | VerifyReport, None]:
    """Runs a verification in a thread, and remembers what was right; closing this stops it."""
    loop = asyncio.get_running_loop()
    updates: asyncio.Queue[VerifyProgress | FileProblem | None] = asyncio.Queue()
    stopped = threading.Event()

    def tell(update: VerifyProgress | FileProblem) -> None:
        loop.call_soon_threadsafe(updates.put_nowait, update)

    def read() -> VerifyReport:
        report = verification.run(tell, stopped)
        note_hashed(repo, report.stamps)
        return report

    work = asyncio.create_task(asyncio.to_thread(read))
    work.add_done_callback(lambda _: updates.put_nowait(None))
    try:
        while (update := await updates.get()) is not None:
            yield update
        yield await work
    finally:
        stopped.set()
        await asyncio.wait([work])


async def _report(
    repo: RepoFolder, verification: Verification, publish: Publish[VerifyProgress] = lambda _: None
) -> VerifyReport:
    async with aclosing(_run(repo, verification)) as updates:
        async for update in updates:
            match update:
                case VerifyReport():
                    return update
                case VerifyProgress(total_files=files) if files:
                    publish(update)
    raise RuntimeError("a verification ended without a report")


def _error(repo: RepoFolder, problem: FileProblem) -> LoaderdError:
    if problem.kind is ProblemKind.MISSING:
        return SnapshotIncompleteError(repo.repo_id, problem.path)
    return SnapshotCorruptError(repo.repo_id, problem.path, problem.expected, problem.found)
