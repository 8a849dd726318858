"""What the cache holds, what of it is in use, and what goes.

Deleting and pinning exclude each other: a snapshot that was found is either pinned before a
deletion begins, or seen to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from loaderd.server.errors import CacheLimitError, SnapshotInUseError, SnapshotNotFoundError
from loaderd.server.store import deletion
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.deletion import Deletion, PrunePolicy
from loaderd.server.store.hub_download import DISK_MARGIN_BYTES
from loaderd.server.store.pins import Pin, Pins
from loaderd.server.store.plan import DownloadPlan, DownloadProgress
from loaderd.server.store.scan import CacheContents, CacheScanner, SnapshotInfo

R = TypeVar("R")

DOWNLOAD = "download"
"""The holder of the snapshots of a repository that is being downloaded."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a deletion names: a repository, or one revision of it."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass
class Arrival:
    """A download on its way into the cache.

    Attributes:
        repo_id: Its repository.
        missing_bytes: What is still to come; 0 while that is not known.
    """

    repo_id: str
    missing_bytes: int = 0

    def moved(self, progress: DownloadProgress) -> None:
        """Notes how far it is."""
        self.missing_bytes = max(0, progress.total_bytes - progress.downloaded_bytes)


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
        self._scanner = CacheScanner(cache_dir, lambda repo_id: repo_id in allow_pickle)
        self._pins = Pins()
        self._arrivals: list[Arrival] = []
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    async def contents(self) -> CacheContents:
        """All that the cache holds."""
        return await asyncio.to_thread(self._scanner.scan)

    def holders(self, snapshot: SnapshotInfo) -> tuple[str, ...]:
        """Who uses a snapshot: ids of models, and `DOWNLOAD`."""
        holders = self._pins.holders(snapshot.repo_id, snapshot.commit)
        return (*holders, DOWNLOAD) if self._is_busy(snapshot.repo_id) else holders

    def free_bytes(self) -> int:
        """What is free on the cache's disk."""
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
            if not RepoFolder(self._cache_dir, repo_id).snapshot(commit).is_dir():
                raise SnapshotNotFoundError(f"{repo_id}@{commit}")
            return self._pins.hold(repo_id, commit, holder)

    @asynccontextmanager
    async def arriving(self, repo_id: str) -> AsyncIterator[Arrival]:
        """While a download runs nothing of its repository is deleted: it may share it."""
        arrival = Arrival(repo_id)
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
            policy = PrunePolicy(max_bytes=max(bound, 0))
            plan = self._plan_prune(contents, policy)
            if plan.remaining_bytes > below_limit:
                raise CacheLimitError(needed, max_bytes, plan.remaining_bytes)
            if plan.remaining_bytes <= on_disk:  # else all that would be in vain
                await self._execute(plan)
        arrival.missing_bytes = needed

    async def _delete(self, targets: Sequence[Target], dry_run: bool) -> Deletion:
        contents = await self.contents()
        chosen = {info.path: info for target in targets for info in self._named(contents, target)}
        plan = deletion.plan_deletion(contents, chosen.values(), self._in_use)
        if dry_run:
            return plan
        for info in plan.kept:
            model = f"{info.repo_id}@{info.commit}"
            raise SnapshotInUseError(model, ", ".join(self.holders(info)))
        await self._execute(plan)
        return plan

    async def _prune(self, policy: PrunePolicy, dry_run: bool) -> Deletion:
        plan = self._plan_prune(await self.contents(), policy)
        if not dry_run:
            await self._execute(plan)
        return plan

    def _plan_prune(self, contents: CacheContents, policy: PrunePolicy) -> Deletion:
        now = datetime.now(UTC)
        return deletion.plan_prune(contents, policy, self._in_use, now, self._is_busy)

    async def _execute(self, plan: Deletion) -> None:
        for info in plan.snapshots:
            _log.info("deleting %s@%s", info.repo_id, info.commit)
        await asyncio.to_thread(deletion.execute, plan, self._cache_dir)

    def _named(self, contents: CacheContents, target: Target) -> list[SnapshotInfo]:
        commit = None
        if target.revision is not None:
            repo = RepoFolder(self._cache_dir, target.repo_id)
            commit = repo.cached_commit(target.revision)
            if commit is None:
                raise SnapshotNotFoundError(str(target))
        found = [
            info
            for info in contents.snapshots
            if info.repo_id == target.repo_id and commit in {None, info.commit}
        ]
        if not found:
            raise SnapshotNotFoundError(str(target))
        return found

    def _in_use(self, snapshot: SnapshotInfo) -> bool:
        return bool(self.holders(snapshot))

    def _is_busy(self, repo_id: str) -> bool:
        return any(arrival.repo_id == repo_id for arrival in self._arrivals)

    async def _exclusively(self, work: Callable[[], Awaitable[R]]) -> R:
        """Does what must not stop in the middle, even when its caller goes away."""

        async def run() -> R:
            async with self._lock:
                return await work()

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)
