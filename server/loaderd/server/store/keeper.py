"""What the cache holds, what of it is in use, and what goes.

Deleting and pinning exclude each other: a snapshot that was found is either pinned before a
deletion begins, or seen to be gone. So it is with other processes, as far as locks work.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from loaderd.server.errors import CacheLimitError, SnapshotInUseError, SnapshotNotFoundError
from loaderd.server.store import deletion
from loaderd.server.store.cache import RepoFolder, writing
from loaderd.server.store.deletion import Deletion, PrunePolicy
from loaderd.server.store.hub_download import DISK_MARGIN_BYTES
from loaderd.server.store.locks import share
from loaderd.server.store.pins import Pin, Pins
from loaderd.server.store.plan import DownloadPlan
from loaderd.server.store.scan import CacheContents, CacheScanner, SnapshotInfo
from loaderd.server.store.usage import Arrival, Usage

R = TypeVar("R")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a deletion names: a repository, or one revision of it."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


class Keeper:
    """Lists the cache, pins what is in use, deletes what is not.

    Args:
        cache_dir: The Hugging Face cache.
        max_bytes: How large downloads may make it; None: as large as its disk allows.
        allow_pickle: Repository ids whose weights may be pickles.
    """

    def __init__(
        self, cache_dir: Path, max_bytes: int | None, allow_pickle: Container[str] = ()
    ) -> None:
        self.max_bytes = max_bytes
        self._cache_dir = cache_dir
        self._scanner = CacheScanner(cache_dir, allow_pickle.__contains__)
        self._pins = Pins()
        self._arrivals: list[Arrival] = []
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._alone = False

    def apply(self, max_bytes: int | None, allow_pickle: Container[str]) -> None:
        """Takes other bounds from now on; see `Keeper`."""
        self.max_bytes = max_bytes
        # What the old one knows of snapshots may be otherwise now.
        self._scanner = CacheScanner(self._cache_dir, allow_pickle.__contains__)

    async def contents(self) -> CacheContents:
        """All that the cache holds.

        Raises:
            CacheNotWritableError: It is not ours to read.
        """
        return await asyncio.to_thread(self._contents)

    def holders(self, snapshot: SnapshotInfo) -> tuple[str, ...]:
        """Who uses a snapshot in this daemon: ids of models, and `DOWNLOAD`."""
        return self._usage().holders(snapshot)

    def free_bytes(self) -> int:
        """What is free on the cache's disk.

        Raises:
            CacheNotWritableError: It is not ours to read.
        """
        with writing(self._cache_dir):
            folder = self._cache_dir
            while not folder.is_dir():
                folder = folder.parent
            return shutil.disk_usage(folder).free

    async def hold(self, repo_id: str, commit: str, holder: str) -> Pin:
        """Pins a snapshot until the pin is released.

        Raises:
            SnapshotNotFoundError: It was deleted meanwhile.
        """
        async with self._lock:
            repo = RepoFolder(self._cache_dir, repo_id)
            lock = await asyncio.to_thread(self._share, repo, commit)
            return self._pins.hold(repo_id, commit, holder, lock)

    @asynccontextmanager
    async def arriving(self, repo_id: str) -> AsyncIterator[Arrival]:
        """While a download runs nothing is deleted that it may share; see `Arrival.uses`."""
        arrival = Arrival(RepoFolder(self._cache_dir, repo_id))
        async with self._lock:
            self._arrivals.append(arrival)
        try:
            yield arrival
        finally:
            self._arrivals.remove(arrival)

    async def make_room(self, arrival: Arrival, plan: DownloadPlan) -> None:
        """Deletes what was not used for longest, as far as a download needs it.

        Only below a limit of the cache's size; without one nothing is ever deleted unasked.

        Raises:
            CacheLimitError: What is in use and the download are more than the limit.
        """
        arrival.planned(plan)
        if self.max_bytes is not None and plan.missing_bytes:
            make_room = partial(self._make_room, arrival, plan.missing_bytes, self.max_bytes)
            await self._exclusively(make_room)

    async def delete(self, targets: Sequence[Target], *, dry_run: bool) -> Deletion:
        """Deletes snapshots: all of them, or none if one is in use.

        Raises:
            SnapshotNotFoundError: The cache has none of a target.
            SnapshotInUseError: One is in use, unless this is a dry run.
        """
        return await self._exclusively(partial(self._delete, targets, dry_run))

    async def prune(self, policy: PrunePolicy, *, dry_run: bool) -> Deletion:
        """Deletes what a policy names and is not in use."""
        return await self._exclusively(partial(self._prune, policy, dry_run))

    async def close(self) -> None:
        """Waits for deletions that have begun."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _make_room(self, arrival: Arrival, needed: int, max_bytes: int) -> None:
        contents = await self.contents()
        coming = needed + sum(each.missing_bytes for each in self._arrivals)
        held = contents.total_bytes + contents.orphan_bytes
        below_limit = max_bytes - coming
        on_disk = held + self.free_bytes() - DISK_MARGIN_BYTES - coming
        bound = min(below_limit, on_disk)
        if held > bound:
            usage = self._usage()
            policy = PrunePolicy(max_bytes=max(bound, 0))
            plan = await asyncio.to_thread(_plan_prune, contents, policy, usage)
            if plan.remaining_bytes > below_limit:
                raise CacheLimitError(needed, max_bytes, plan.remaining_bytes)
            if plan.remaining_bytes <= on_disk:  # else all that would be in vain
                await self._execute(plan, usage)
        arrival.missing_bytes = needed

    async def _delete(self, targets: Sequence[Target], dry_run: bool) -> Deletion:
        contents, usage = await self.contents(), self._usage()
        plan = await asyncio.to_thread(self._plan_deletion, contents, targets, usage)
        if dry_run:
            return plan
        for info in plan.kept:
            model = f"{info.repo_id}@{info.commit}"
            raise SnapshotInUseError(model, ", ".join(plan.holders[info.path]))
        await self._execute(plan, usage)
        return plan

    async def _prune(self, policy: PrunePolicy, dry_run: bool) -> Deletion:
        contents, usage = await self.contents(), self._usage()
        plan = await asyncio.to_thread(_plan_prune, contents, policy, usage)
        if not dry_run:
            await self._execute(plan, usage)
        return plan

    async def _execute(self, plan: Deletion, usage: Usage) -> None:
        for info in plan.snapshots:
            _log.info("deleting %s@%s", info.repo_id, info.commit)
        await asyncio.to_thread(deletion.execute, plan, self._cache_dir, usage.is_busy)

    def _plan_deletion(
        self, contents: CacheContents, targets: Sequence[Target], usage: Usage
    ) -> Deletion:
        by_repo: dict[str, list[SnapshotInfo]] = defaultdict(list)
        for info in contents.snapshots:
            by_repo[info.repo_id].append(info)
        with writing(self._cache_dir):
            chosen = {i.path: i for target in targets for i in self._named(by_repo, target)}
        return deletion.plan_deletion(contents, chosen.values(), usage.all_holders, usage.is_busy)

    def _named(
        self, by_repo: Mapping[str, list[SnapshotInfo]], target: Target
    ) -> list[SnapshotInfo]:
        found = by_repo.get(target.repo_id, [])
        if target.revision is not None and found:
            repo = RepoFolder(self._cache_dir, target.repo_id)
            commit = repo.cached_commit(target.revision)
            found = [info for info in found if info.commit == commit]
        if not found:
            raise SnapshotNotFoundError(str(target))
        return found

    def _contents(self) -> CacheContents:
        with writing(self._cache_dir):
            return self._scanner.scan()

    def _usage(self) -> Usage:
        return Usage(self._cache_dir, self._pins.all(), tuple(self._arrivals))

    def _share(self, repo: RepoFolder, commit: str) -> BinaryIO | None:
        """Tells other processes that a snapshot is used, where that can be told."""
        lock = None
        try:
            lock = share(repo.pin(commit))
        except OSError as error:
            if not self._alone:
                self._alone = True
                _log.warning("other processes cannot tell which snapshots are used: %s", error)
        if not repo.has_snapshot(commit):
            if lock is not None:
                lock.close()
            raise SnapshotNotFoundError(f"{repo.repo_id}@{commit}")
        return lock

    async def _exclusively(self, work: Callable[[], Awaitable[R]]) -> R:
        """Does what must not stop in the middle, even when its caller goes away."""

        async def run() -> R:
            async with self._lock:
                return await work()

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def _plan_prune(contents: CacheContents, policy: PrunePolicy, usage: Usage) -> Deletion:
    now = datetime.now(UTC)
    return deletion.plan_prune(contents, policy, usage.all_holders, now, usage.is_busy)
