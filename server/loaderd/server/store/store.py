"""The store: all model files of this box, as the daemon uses them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from loaderd.server.errors import (
    DownloadCancelledError,
    HubRateLimitedError,
    HubUnreachableError,
    LoaderdError,
    OfflineNotCachedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
    SnapshotNotFoundError,
    UnsupportedOptionError,
)
from loaderd.server.single_flight import Flight, Publish, SingleFlight
from loaderd.server.store import records
from loaderd.server.store.blobs import SnapshotFiles, sweep
from loaderd.server.store.cache import RepoFolder, writing
from loaderd.server.store.deletion import Deletion, PrunePolicy, remove_trash
from loaderd.server.store.downloads import Downloads
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.keeper import Keeper, Target
from loaderd.server.store.listing import CacheListing, Download
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.notes import note_hashed, note_use
from loaderd.server.store.pins import Pin
from loaderd.server.store.plan import DownloadPlan, DownloadProgress, DownloadState
from loaderd.server.store.resolve import (
    CachedSnapshot,
    LocalFolder,
    NotCached,
    Resolution,
    allows_pickle,
    resolve,
)
from loaderd.server.store.scan import SnapshotInfo, describe
from loaderd.server.store.settings import StoreSettings
from loaderd.server.store.verifications import Proving, Verifications, VerifyUpdate
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import annotate, stage

__all__ = [
    "CachedSnapshot",
    "DownloadPlan",
    "DownloadProgress",
    "DownloadState",
    "LocalFolder",
    "ModelStore",
    "NotCached",
    "StoreSettings",
]

# Old enough that no download that still runs has written it last, even where locks do not work.
ORPHAN_AGE_SECONDS = 3600.0

VERIFICATION = "verification"
"""The holder of a snapshot while it is verified."""

_log = logging.getLogger(__name__)


DownloadFlight = Flight[DownloadState, CachedSnapshot]


class ModelStore:
    """Finds, downloads, lists, verifies and deletes model files.

    Nothing blocks the event loop: files are read in threads, the hub is asked in child
    processes. `start` once, `close` at the end.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._downloads = Downloads(settings.cache_dir, _access(settings), settings.stall_timeout)
        self._keeper = Keeper(settings.cache_dir, settings.max_bytes, settings.allow_pickle)
        self._flights: SingleFlight[HubName, DownloadState, CachedSnapshot] = SingleFlight(
            "download"
        )
        self._plans: SingleFlight[HubName, None, DownloadPlan] = SingleFlight()
        self._verifications = Verifications(self._fetch, offline=settings.offline)

    def apply(self, settings: StoreSettings) -> None:
        """Works with other settings of the same cache; what runs ends as it has begun."""
        self._downloads.apply(_access(settings), settings.stall_timeout)
        self._keeper.apply(settings.max_bytes, settings.allow_pickle)
        self._verifications.offline = settings.offline
        self.settings = settings

    async def start(self) -> None:
        """Deletes what was left behind by downloads and deletions that were killed."""
        cache_dir = self.settings.cache_dir
        if os.access(cache_dir, os.F_OK) and not os.access(cache_dir, os.W_OK):
            _log.warning("the cache %s cannot be written to; every download will fail", cache_dir)
            return
        freed = await asyncio.to_thread(self._sweep)
        if freed:
            _log.info("deleted %d bytes of downloads that never ended", freed)

    async def resolve(self, name: HubName | LocalName) -> Resolution:
        """Says where a name's files are, without asking the hub; see `resolve.resolve`.

        Raises:
            ModelNotAllowedError, ModelTooLargeError: The operator does not allow it.
            LoaderdError: As `resolve.resolve`.
        """
        return await asyncio.to_thread(self._resolve, name)

    def allows_pickle(self, name: HubName | LocalName) -> bool:
        """Whether the operator allows weights in pickles for a name."""
        return allows_pickle(self.settings.allow_pickle, name)

    async def look_up(
        self, name: HubName | LocalName, *, refresh: bool
    ) -> LocalFolder | CachedSnapshot | DownloadPlan:
        """Says where a name's files are, or what a download would fetch.

        Args:
            name: What to look for.
            refresh: Ask the hub what the name is now, even if the cache has it.

        Returns:
            A snapshot is marked stale when the hub should have been asked and did not answer.

        Raises:
            OfflineNotCachedError: The hub must not be asked, and the cache lacks the name.
            LoaderdError: As `resolve.resolve` and `hub.plan`.
        """
        if isinstance(name, HubName):
            name = await asyncio.to_thread(self._exact, name)
        found = await self.resolve(name)
        if isinstance(found, LocalFolder) or isinstance(name, LocalName):
            if isinstance(found, NotCached):
                raise TypeError(f"{name} is no name of the hub's")
            return found
        if isinstance(found, CachedSnapshot) and (name.commit or not refresh):
            return found
        if self.settings.offline:
            return await self._last_good(name, found)
        try:
            plan = await self._plan(name)
        except (HubUnreachableError, HubRateLimitedError) as error:
            return await self._last_good(name, found, error)
        current = await self.resolve(HubName(name.repo_id, plan.commit))
        if isinstance(current, CachedSnapshot):
            return replace(current, revision=name.revision)
        return plan

    def download(self, name: HubName) -> AbstractAsyncContextManager[DownloadFlight]:
        """Joins the download of a name, or starts it; see `SingleFlight.join`.

        The hub is asked what the name is now, unless it is a commit. When the hub does not
        answer and the cache has a whole snapshot, that is the result, marked stale.

        Raises:
            ModelNotAllowedError: The operator does not allow it.

        The flight's result raises:
            OfflineNotCachedError: The hub must not be asked, and the cache lacks the name.
            SnapshotIncompleteError, SnapshotCorruptError: The same, but the cache has a part of
                it; or what came from the hub is not what it had announced.
            CacheLimitError: It does not fit below the limit of the cache's size.
            DownloadCancelledError: See `cancel`.
            LoaderdError: See `Downloads.download`.
        """
        self._check(name)
        return self._flights.join(name, partial(self._download, name))

    async def cancel(self, name: HubName) -> tuple[int, int]:
        """Stops the download of a name for all who wait for it.

        Returns:
            How many waited; and the bytes of unfinished files, from which the next one goes on.
        """
        error = DownloadCancelledError(str(name))
        ended = await self._verifications.abort_repairs(self._repo(name), name.revision, error)
        if flight := self._flights.flights.get(name):
            ended.append((flight.latest, flight.waiters))
            await self._flights.abort(name, error)
        plans = [state.plan for state, _ in ended if state is not None and state.plan is not None]
        kept = [await asyncio.to_thread(self._kept_bytes, plan) for plan in plans]
        return sum(waiters for _, waiters in ended), sum(kept)

    async def hold(self, files: CachedSnapshot, holder: str) -> Pin:
        """Keeps a snapshot from being deleted until the pin is released; notes its use.

        Raises:
            SnapshotNotFoundError: It was deleted meanwhile.
        """
        pin = await self._keeper.hold(files.repo_id, files.commit, holder)
        try:
            await asyncio.to_thread(note_use, self.settings.cache_dir, files)
        except BaseException:
            pin.release()
            raise
        return pin

    async def snapshots(self) -> CacheListing:
        """What the cache holds now, and what is on its way into it."""
        contents = await self._keeper.contents()
        downloads = [_under_way(*each) for each in self._flights.flights.items()]
        repairs = [_under_way(*each) for each in self._verifications.repairs()]
        return CacheListing(
            snapshots=contents.snapshots,
            total_bytes=contents.total_bytes,
            orphan_bytes=contents.orphan_bytes,
            downloads=(*downloads, *repairs),
            free_bytes=self._keeper.free_bytes(),
            max_bytes=self._keeper.max_bytes,
        )

    def holders(self, snapshot: SnapshotInfo) -> tuple[str, ...]:
        """Who uses a snapshot; see `Keeper.holders`."""
        return self._keeper.holders(snapshot)

    async def describe(self, repo_id: str, commit: str) -> SnapshotInfo:
        """One snapshot.

        Raises:
            SnapshotNotFoundError: It was deleted meanwhile.
        """
        repo = RepoFolder(self.settings.cache_dir, repo_id)
        allowed = self.settings.allow_pickle.__contains__
        try:
            return await asyncio.to_thread(describe, repo, commit, allowed)
        except FileNotFoundError:
            raise SnapshotNotFoundError(f"{repo_id}@{commit}") from None

    async def verify(self, name: HubName, *, repair: bool) -> AsyncGenerator[VerifyUpdate, None]:
        """Compares a snapshot's files with their hashes.

        Args:
            name: A revision in the cache.
            repair: Fetch what has a problem again, and nothing else.

        Yields:
            Progress, problems as they are found, the repair's progress, and the report at the end.

        Raises:
            SnapshotNotFoundError: The cache has no snapshot of the name.
            UnsupportedOptionError: A repair, and the hub must not be asked.
            ModelNotAllowedError: A repair, and the operator does not allow the model.
            CacheNotWritableError: The cache is not ours to look into.
            LoaderdError: The repair failed; as `download`.
        """
        if repair:
            self._check(name)
        if repair and self.settings.offline:
            raise UnsupportedOptionError("repair", "the daemon is offline and must not ask the hub")
        repo = self._repo(name)
        with writing(self.settings.cache_dir):  # reading needs as much of its owner's leave
            commit = await asyncio.to_thread(repo.cached_commit, name.revision)
        if commit is None:
            raise SnapshotNotFoundError(str(name))
        pin = await self._keeper.hold(name.repo_id, commit, VERIFICATION)
        allow_pickle = self.allows_pickle(name)
        reading = self._verifications.verify(repo, commit, allow_pickle=allow_pickle, repair=repair)
        try:
            async with aclosing(reading) as updates:
                async for update in updates:
                    yield update
        finally:
            pin.release()

    async def prove(self, files: CachedSnapshot, publish: Publish[Proving]) -> None:
        """Makes sure that a snapshot's content is what its hashes say; see `Verifications.prove`.

        Args:
            files: The snapshot.
            publish: Told how far it is, if there is anything to be read or fetched.
        """
        name = HubName(files.repo_id, files.commit)
        await self._verifications.prove(
            self._repo(name),
            files.commit,
            allow_pickle=self.allows_pickle(name),
            publish=publish,
        )

    async def delete(self, targets: Sequence[Target], *, dry_run: bool) -> Deletion:
        """Deletes snapshots; see `Keeper.delete`."""
        return await self._keeper.delete(targets, dry_run=dry_run)

    async def prune(self, policy: PrunePolicy, *, dry_run: bool) -> Deletion:
        """Deletes what a policy names; see `Keeper.prune`."""
        return await self._keeper.prune(policy, dry_run=dry_run)

    async def close(self) -> None:
        """Ends all downloads, and waits for deletions that have begun. Later ones are refused."""
        await self._downloads.close()
        await self._keeper.close()

    async def _plan(self, name: HubName) -> DownloadPlan:
        """Asks the hub what a download would fetch; who asks meanwhile shares the answer."""

        async def plan(_publish: Publish[None]) -> DownloadPlan:
            return await self._downloads.plan(name, allow_pickle=self.allows_pickle(name))

        async with self._plans.join(name, plan) as flight:
            return await flight.result()

    async def _download(self, name: HubName, publish: Publish[DownloadState]) -> CachedSnapshot:
        def proving(update: Proving) -> None:
            if isinstance(update, DownloadProgress):
                publish(DownloadState(None, update))

        annotate({names.MODEL: str(name)})
        name = await asyncio.to_thread(self._exact, name)
        if name.commit or self.settings.offline:
            found = await self.resolve(name)
            if isinstance(found, CachedSnapshot) and name.commit:
                with stage("verify"):
                    await self.prove(found, proving)
                return found
            if self.settings.offline:
                return await self._last_good(name, found)
        try:
            commit = await self._fetch(name, frozenset(), publish)
        except (HubUnreachableError, HubRateLimitedError) as error:
            return await self._last_good(name, await self.resolve(name), error)
        found = await self.resolve(HubName(name.repo_id, commit))
        if not isinstance(found, CachedSnapshot):
            raise _problem(found) or SnapshotIncompleteError(str(name), "snapshot")
        files = replace(found, revision=name.revision)
        with stage("verify"):
            await self.prove(files, proving)  # others may have brought a part of it
        await asyncio.to_thread(note_use, self.settings.cache_dir, files)
        return files

    async def _fetch(
        self, name: HubName, distrusted: frozenset[str], publish: Publish[DownloadState]
    ) -> str:
        """Brings what the hub says that a name is now into the cache; returns the commit."""
        plan: DownloadPlan | None = None
        async with self._keeper.arriving(name.repo_id) as arrival:

            async def admit(found: DownloadPlan) -> None:
                nonlocal plan
                plan = found
                annotate(
                    {
                        names.REVISION: found.commit,
                        names.BYTES: found.missing_bytes,
                        names.FILES: len(found.files),
                    }
                )
                self.settings.policy.check_size(str(name), found.total_bytes)
                await self._keeper.make_room(arrival, found)
                publish(DownloadState(found))

            def report(progress: DownloadProgress) -> None:
                arrival.moved(progress)
                publish(DownloadState(plan, progress))

            done = await self._downloads.download(
                name,
                report,
                admit=admit,
                distrusted=distrusted,
                allow_pickle=self.allows_pickle(name),
            )
        await asyncio.to_thread(note_hashed, self._repo(name), done.stamps)
        return done.commit

    async def _last_good(
        self, name: HubName, found: Resolution, error: LoaderdError | None = None
    ) -> CachedSnapshot:
        """What the cache has when the hub cannot say what a name is now.

        That is what the name is in the cache, or, when that is not whole, for example because
        another program's update failed, the last commit that was.

        Raises:
            SnapshotIncompleteError, SnapshotCorruptError: What was whole is damaged.
            LoaderdError: `error`, or OfflineNotCachedError without one: there is nothing whole.
        """
        commit: str | None = None
        if isinstance(found, NotCached) and name.commit is None:
            commit = await asyncio.to_thread(records.last_complete, self._repo(name), name.revision)
            if commit is not None:
                found = await self.resolve(HubName(name.repo_id, commit))
        if not isinstance(found, CachedSnapshot):
            problem = _problem(found)
            if problem and (commit is not None or isinstance(problem, SnapshotCorruptError)):
                raise problem  # a hub that comes back does not make this a matter of waiting
            raise error or problem or OfflineNotCachedError(str(name))
        if error is not None:
            _log.warning("%s is served as it is in the cache: %s", name, error)
        return replace(found, revision=name.revision, stale=name.commit is None)

    def _check(self, name: HubName | LocalName) -> None:
        self.settings.policy.check(name, self.settings.cache_dir)

    def _resolve(self, name: HubName | LocalName) -> Resolution:
        self._check(name)
        found = resolve(
            self._exact(name) if isinstance(name, HubName) else name,
            cache_dir=self.settings.cache_dir,
            local_roots=self.settings.local_roots,
            allow_pickle=self.allows_pickle(name),
        )
        if not isinstance(found, NotCached):
            self.settings.policy.check_size(str(name), found.size_bytes)
        return found

    def _exact(self, name: HubName) -> HubName:
        """The name by its whole commit if it has the begin of a cached one."""
        commit = self._repo(name).begun_commit(name.revision)
        return name if commit is None else HubName(name.repo_id, commit)

    def _repo(self, name: HubName) -> RepoFolder:
        return RepoFolder(self.settings.cache_dir, name.repo_id)

    def _kept_bytes(self, plan: DownloadPlan) -> int:
        """What is left of the files that a download did not finish."""
        files = SnapshotFiles(RepoFolder(self.settings.cache_dir, plan.repo_id), plan.commit)
        return sum({file.digest: files.partial_bytes(file) for file in plan.files}.values())

    def _sweep(self) -> int:
        """Sweeps what it can: a cache that is not in order must not keep a daemon from starting."""
        freed = 0
        try:
            repos = list(RepoFolder.all(self.settings.cache_dir))
        except OSError as error:
            _log.warning("the cache cannot be read; every download will fail: %s", error)
            return 0
        for repo in repos:
            try:
                remove_trash(repo)
                freed += sweep(repo, min_age=ORPHAN_AGE_SECONDS)
            except (LoaderdError, OSError) as error:
                _log.warning("left-overs of %s stay: %s", repo.repo_id, error)
        return freed


def _access(settings: StoreSettings) -> HubAccess:
    return HubAccess(settings.hub_endpoint, settings.hub_token, settings.retry)


def _under_way(name: HubName, flight: Flight[DownloadState, Any]) -> Download:
    return Download(name, flight.latest or DownloadState(), flight.waiters)


def _problem(found: Resolution) -> LoaderdError | None:
    return found.problem if isinstance(found, NotCached) else None
