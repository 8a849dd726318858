"""The daemon's side of verifications, which read in threads; and what follows from them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from functools import partial

from loaderd.server.errors import (
    HubRateLimitedError,
    HubUnreachableError,
    LoaderdError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
    SnapshotNotFoundError,
)
from loaderd.server.single_flight import Flight, Publish, SingleFlight
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.names import HubName
from loaderd.server.store.notes import note_hashed
from loaderd.server.store.plan import DownloadProgress, DownloadState
from loaderd.server.store.resolve import needed_files
from loaderd.server.store.selection import has_weights
from loaderd.server.store.verify import (
    FileProblem,
    ProblemKind,
    Verification,
    VerifyProgress,
    VerifyReport,
)

Fetch = Callable[[HubName, frozenset[str], Publish[DownloadState]], Awaitable[str]]
"""Brings a commit into the cache; the content of the given paths is known to be bad."""

# Readings of loads, which do not wait for one another, and of verifications.
_MOST_READINGS = 64
_MOST_AT_ONCE = 2

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


Proving = VerifyProgress | DownloadProgress
"""How far a proof is: reading, or fetching what is damaged."""


class Verifications:
    """Compares snapshots with their hashes, and mends what differs.

    Args:
        fetch: Fetches what is damaged.
        offline: The hub must not be asked.
    """

    def __init__(self, fetch: Fetch, *, offline: bool) -> None:
        self._fetch = fetch
        self.offline = offline
        self._repairs: SingleFlight[tuple[HubName, frozenset[str]], DownloadState, str] = (
            SingleFlight()
        )
        # Of its own: files are found and listed in the loop's executor, which must not wait.
        self._executor = ThreadPoolExecutor(_MOST_READINGS, "verification")
        self._turns = asyncio.Semaphore(_MOST_AT_ONCE)

    async def verify(
        self, repo: RepoFolder, commit: str, *, allow_pickle: bool, repair: bool
    ) -> AsyncGenerator[VerifyUpdate, None]:
        """Reads a whole snapshot; see `ModelStore.verify`."""
        problems: dict[str, FileProblem] = {}
        read = partial(Verification, repo, commit, allow_pickle=allow_pickle)
        async with self._turns:
            report = VerifyReport((), 0, 0, ())
            async with aclosing(self._run(repo, read())) as updates:
                async for update in updates:
                    if isinstance(update, VerifyReport):
                        report = update
                    else:
                        yield update
            first = last = report
            # A mended index may name further files.
            while repair and (new := _paths(last).difference(problems)):
                problems |= {problem.path: problem for problem in last.problems}
                async with self._mending(repo, commit, new) as flight:
                    async for state in flight.progress():
                        yield state.progress
                    await flight.result()
                last = await self._report(repo, read(known=await _hashed(repo)))
            problems |= {problem.path: problem for problem in last.problems}
        found = replace(first, problems=tuple(problems[path] for path in sorted(problems)))
        yield Verified(repo.repo_id, commit, found, bool(problems) and not last.problems)

    async def prove(
        self,
        repo: RepoFolder,
        commit: str,
        *,
        allow_pickle: bool,
        publish: Publish[Proving],
    ) -> None:
        """Makes sure that what loading needs is what its hashes say.

        A content that was hashed since it was last written is not read again. What is damaged is
        fetched again, once.

        Raises:
            SnapshotCorruptError, SnapshotIncompleteError: It is damaged, and the hub does not
                answer, must not be asked, or has no better.
            SnapshotNotFoundError: It was deleted meanwhile.
            LoaderdError: The repair failed.
        """
        tried: frozenset[str] = frozenset()
        while True:
            report = await self._read_needed(repo, commit, allow_pickle, publish)
            damaged = _paths(report)
            if not damaged:
                return
            damage = _error(repo, report.problems[0])
            if self.offline or damaged <= tried:
                raise damage
            _log.warning("%s", damage)
            tried |= damaged
            try:
                async with self._mending(repo, commit, damaged) as flight:
                    async for state in flight.progress():
                        publish(state.progress)
                    await flight.result()
            except (HubUnreachableError, HubRateLimitedError) as error:
                raise damage from error

    def repairs(self) -> list[tuple[HubName, Flight[DownloadState, str]]]:
        """The repairs under way, by their exact names."""
        return [(name, flight) for (name, _), flight in self._repairs.flights.items()]

    async def abort_repairs(
        self, repo: RepoFolder, revision: str, error: LoaderdError
    ) -> list[tuple[DownloadState | None, int]]:
        """Stops the repairs of a revision; returns where each stood, and how many waited."""
        commit = await asyncio.to_thread(repo.commit_of, revision)
        aborted: list[tuple[DownloadState | None, int]] = []
        for key, flight in list(self._repairs.flights.items()):
            if key[0] == HubName(repo.repo_id, commit or revision):
                aborted.append((flight.latest, flight.waiters))
                await self._repairs.abort(key, error)
        return aborted

    def _mending(
        self, repo: RepoFolder, commit: str, damaged: frozenset[str]
    ) -> AbstractAsyncContextManager[Flight[DownloadState, str]]:
        name = HubName(repo.repo_id, commit)
        return self._repairs.join((name, damaged), partial(self._fetch, name, damaged))

    async def _read_needed(
        self,
        repo: RepoFolder,
        commit: str,
        allow_pickle: bool,
        publish: Publish[VerifyProgress],
    ) -> VerifyReport:
        """Reads what loading needs and nobody has hashed since it was last written."""
        try:
            needed = await asyncio.to_thread(needed_files, repo, commit, allow_pickle=allow_pickle)
        except SnapshotIncompleteError as error:  # an index that is gone, or nonsense: to be mended
            needed = [error.file]
        except SnapshotCorruptError as error:
            needed = [error.file]
        except OSError:
            raise SnapshotNotFoundError(f"{repo.repo_id}@{commit}") from None
        known = await _hashed(repo)
        reading = Verification(repo, commit, allow_pickle=allow_pickle, paths=needed, known=known)
        report = await self._report(repo, reading, publish)
        foreign = [path for path in report.unverifiable_files if has_weights([path])]
        if foreign and await asyncio.to_thread(repo.read_tree, commit) is not None:
            raise SnapshotCorruptError(
                repo.repo_id, foreign[0], "a file of the commit", "one that its listing lacks"
            )
        return report

    async def _run(
        self, repo: RepoFolder, verification: Verification
    ) -> AsyncGenerator[VerifyProgress | FileProblem | VerifyReport, None]:
        """Runs a verification in a thread, and remembers what it found; closing this stops it."""
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[VerifyProgress | FileProblem | None] = asyncio.Queue()
        stopped = threading.Event()

        def tell(update: VerifyProgress | FileProblem) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        def read() -> VerifyReport:
            try:
                report = verification.run(tell, stopped)
            except PermissionError as error:
                raise SnapshotCorruptError(
                    repo.repo_id, str(error.filename), "a file that may be read", "no permission"
                ) from error
            note_hashed(repo, report.stamps, report.wrong)
            return report

        work = loop.run_in_executor(self._executor, read)
        work.add_done_callback(lambda _: updates.put_nowait(None))
        try:
            while (update := await updates.get()) is not None:
                yield update
            yield await work
        finally:
            stopped.set()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # seen: when this is closed early nobody waits for it

    async def _report(
        self,
        repo: RepoFolder,
        verification: Verification,
        publish: Publish[VerifyProgress] = lambda _: None,
    ) -> VerifyReport:
        """Runs a verification for its report; tells how far it is if there is anything to read."""
        async with aclosing(self._run(repo, verification)) as updates:
            async for update in updates:
                match update:
                    case VerifyReport():
                        return update
                    case VerifyProgress(total_files=files) if files:
                        publish(update)
        raise RuntimeError("a verification ended without a report")


async def _hashed(repo: RepoFolder) -> dict[str, str]:
    return await asyncio.to_thread(records.hashed, repo)


def _paths(report: VerifyReport) -> frozenset[str]:
    return frozenset(problem.path for problem in report.problems)


def _error(repo: RepoFolder, problem: FileProblem) -> LoaderdError:
    if problem.kind is ProblemKind.MISSING:
        return SnapshotIncompleteError(repo.repo_id, problem.path)
    return SnapshotCorruptError(repo.repo_id, problem.path, problem.expected, problem.found)
