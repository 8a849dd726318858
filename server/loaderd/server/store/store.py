"""The store: all model files of this box, as the daemon uses them."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from loaderd.server.errors import (
    HubRateLimitedError,
    HubUnreachableError,
    LoaderdError,
    OfflineNotCachedError,
    SnapshotIncompleteError,
)
from loaderd.server.single_flight import Flight, Publish, SingleFlight
from loaderd.server.store.blobs import sweep
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.downloads import Downloads
from loaderd.server.store.hub_access import HubAccess, RetryPolicy
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.plan import DownloadPlan, DownloadProgress, PlannedFile
from loaderd.server.store.resolve import (
    CachedSnapshot,
    LocalFolder,
    NotCached,
    Resolution,
    resolve,
)
from loaderd.server.store.scan import CacheContents, SnapshotInfo, describe, scan

__all__ = [
    "CacheContents",
    "CachedSnapshot",
    "DownloadPlan",
    "DownloadProgress",
    "LocalFolder",
    "ModelStore",
    "NotCached",
    "PlannedFile",
    "SnapshotInfo",
    "StoreSettings",
]

# Old enough that no download that still runs has written it last, even where locks do not work.
ORPHAN_AGE_SECONDS = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreSettings:
    """What the store works with.

    Attributes:
        cache_dir: The Hugging Face cache; made when something is downloaded.
        local_roots: The folders below which local models may be.
        hub_endpoint: The hub.
        hub_token: The hub token; None asks without one.
        offline: Never ask the hub.
        stall_timeout: Seconds that a download may make no progress.
        retry: How often to ask a hub that is busy.
    """

    cache_dir: Path
    local_roots: tuple[Path, ...] = ()
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = field(default=None, repr=False)
    offline: bool = False
    stall_timeout: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class ModelStore:
    """Finds, downloads and lists model files.

    Nothing blocks the event loop: files are read in threads, the hub is asked in child
    processes. `start` once, `close` at the end.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        access = HubAccess(settings.hub_endpoint, settings.hub_token, settings.retry)
        self._downloads = Downloads(settings.cache_dir, access, settings.stall_timeout)
        self._flights: SingleFlight[HubName, DownloadProgress, CachedSnapshot] = SingleFlight()

    async def start(self) -> None:
        """Deletes what downloads left behind that were killed in an earlier life."""
        cache_dir = self.settings.cache_dir
        if cache_dir.exists() and not os.access(cache_dir, os.W_OK):
            _log.warning("the cache %s cannot be written to; every download will fail", cache_dir)
        freed = await asyncio.to_thread(self._sweep)
        if freed:
            _log.info("deleted %d bytes of downloads that never ended", freed)

    async def resolve(self, name: HubName | LocalName) -> Resolution:
        """Says where a name's files are, without asking the hub; see `resolve.resolve`."""
        return await asyncio.to_thread(
            resolve,
            name,
            cache_dir=self.settings.cache_dir,
            local_roots=self.settings.local_roots,
        )

    async def plan(self, name: HubName) -> DownloadPlan:
        """Asks the hub what a download would fetch; see `hub.plan`.

        Raises:
            OfflineNotCachedError: The hub must not be asked.
        """
        if self.settings.offline:
            raise OfflineNotCachedError(str(name))
        return await self._downloads.plan(name)

    def download(
        self, name: HubName
    ) -> AbstractAsyncContextManager[Flight[DownloadProgress, CachedSnapshot]]:
        """Joins the download of a name, or starts it; see `SingleFlight.join`.

        The hub is asked what the name is now, unless it is a commit. When the hub does not
        answer and the cache has a whole snapshot, that is the result, marked stale.

        The flight's result raises:
            OfflineNotCachedError: The hub must not be asked, and the cache lacks the name.
            SnapshotIncompleteError, SnapshotCorruptError: The same, but the cache has a part of
                it; or what came from the hub is not what it had announced.
            LoaderdError: See `Downloads.download`.
        """
        return self._flights.join(name, partial(self._download, name))

    async def snapshots(self) -> CacheContents:
        """Lists the cache."""
        return await asyncio.to_thread(scan, self.settings.cache_dir)

    async def snapshot(self, files: CachedSnapshot) -> SnapshotInfo:
        """Describes one snapshot."""
        repo = RepoFolder(self.settings.cache_dir, files.repo_id)
        return await asyncio.to_thread(describe, repo, files.commit)

    async def close(self) -> None:
        """Ends all downloads. Later ones are refused."""
        await self._downloads.close()

    async def _download(self, name: HubName, publish: Publish[DownloadProgress]) -> CachedSnapshot:
        if name.commit or self.settings.offline:
            found = await self.resolve(name)
            if isinstance(found, CachedSnapshot):
                return found
            if self.settings.offline:
                raise _problem(found) or OfflineNotCachedError(str(name))
        try:
            commit = await self._downloads.download(name, publish)
        except (HubUnreachableError, HubRateLimitedError) as error:
            found = await self.resolve(name)
            if isinstance(found, CachedSnapshot):
                _log.warning("%s is served as it is in the cache: %s", name, error)
                return replace(found, stale=True)
            raise
        found = await self.resolve(HubName(name.repo_id, commit))
        if isinstance(found, CachedSnapshot):
            return replace(found, revision=name.revision)
        raise _problem(found) or SnapshotIncompleteError(str(name), "snapshot")

    def _sweep(self) -> int:
        repos = RepoFolder.all(self.settings.cache_dir)
        return sum(sweep(repo, min_age=ORPHAN_AGE_SECONDS) for repo in repos)


def _problem(found: Resolution) -> LoaderdError | None:
    return found.problem if isinstance(found, NotCached) else None
