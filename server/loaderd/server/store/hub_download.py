"""A plan's files on their way from the hub into the cache."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from loaderd.server.errors import DiskFullError, SnapshotCorruptError
from loaderd.server.store.blobs import SnapshotFiles
from loaderd.server.store.cache import RepoFolder, TreeEntry
from loaderd.server.store.digests import digest_of_file
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_cache import tag
from loaderd.server.store.hub_errors import is_disk_full
from loaderd.server.store.hub_fetch import FileFetch
from loaderd.server.store.plan import (
    Downloaded,
    DownloadPlan,
    DownloadProgress,
    FileProgress,
    PlannedFile,
)
from loaderd.server.store.rate import Rate
from loaderd.server.store.selection import has_weights

PARALLEL_FILES = 8

DISK_MARGIN_BYTES = 64 << 20
"""What a download leaves free on the cache's disk."""

OnProgress = Callable[[DownloadProgress], None]

_POLL_SECONDS = 0.1


class Download:
    """One download: its threads, and how far they are.

    Args:
        plan: What to bring.
        cache_dir: Where.
        access: Where from.
        distrusted: Paths whose content is hashed before it is taken for whole.
    """

    def __init__(
        self, plan: DownloadPlan, cache_dir: Path, access: HubAccess, distrusted: Collection[str]
    ) -> None:
        self._plan = plan
        self._repo = RepoFolder(cache_dir, plan.repo_id)
        self._files = SnapshotFiles(self._repo, plan.commit)
        self._fetches = [
            FileFetch(
                self._files,
                plan.commit,
                file,
                access,
                distrusted=file.path in distrusted,
                moved=self._moved,
                wait=self._wait,
                check=self._check,
            )
            for file in plan.files
        ]
        self._stopped = threading.Event()
        self._movements = 0
        self._rate = Rate()

    def run(self, on_progress: OnProgress, on_moved: Callable[[], None]) -> Downloaded:
        """See `hub.download`."""
        plan = self._plan
        report = self._reporter(on_progress, on_moved)
        pool = ThreadPoolExecutor(PARALLEL_FILES, "hub")
        in_parallel = partial(self._in_parallel, pool, report)
        try:
            known = self._repo.read_tree(plan.commit) or {}
            in_parallel(partial(self._check_entry, file, known) for file in plan.files)
            in_parallel(fetch.look for fetch in self._fetches)
            self._check_disk()
            tag(self._repo.cache_dir)
            if plan.tree:
                self._repo.write_tree(plan.commit, plan.tree)
            # Weights come last: a snapshot that has them has everything.
            weights = [fetch for fetch in self._fetches if has_weights([fetch.file.path])]
            in_parallel(fetch.run for fetch in self._fetches if fetch not in weights)
            in_parallel(fetch.run for fetch in weights)
            self._repo.write_ref(plan.revision, plan.commit)
        except BaseException as error:
            self._stopped.set()
            if is_disk_full(error):
                raise self._make_room() from error
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        stamps = {f.file.digest: f.stamp for f in self._fetches if f.stamp is not None}
        return Downloaded(self._repo.snapshot(plan.commit), stamps)

    def _in_parallel(
        self,
        pool: ThreadPoolExecutor,
        report: Callable[[], None],
        steps: Iterable[Callable[[], None]],
    ) -> None:
        """Takes all steps; ends with the first that fails."""
        pending = {pool.submit(step) for step in steps}
        report()
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            report()

    def _check_entry(self, file: PlannedFile, known: Mapping[str, TreeEntry]) -> None:
        """A commit never changes. If the hub says so, it is wrong where what we have is whole."""
        entry = known.get(file.path)
        if entry is None or (entry.digest, entry.size) == (file.digest, file.size_bytes):
            return
        path = self._files.pointer(file)
        if path.is_file() and digest_of_file(path, entry.digest, self._moved) == entry.digest:
            raise SnapshotCorruptError(
                self._plan.repo_id, file.path, entry.digest, "another file of the same commit"
            )

    def _check_disk(self) -> None:
        full = self._disk_full()
        missing = any(not fetch.has_content for fetch in self._fetches)
        if missing and full.needed_bytes > full.free_bytes:
            raise full

    def _make_room(self) -> DiskFullError:
        """Takes away what came; a full disk harms everybody who uses it."""
        for fetch in self._fetches:
            fetch.drop_partial()
        return self._disk_full()

    def _disk_full(self) -> DiskFullError:
        missing = {
            fetch.file.digest: fetch.file.size_bytes - self._files.partial_bytes(fetch.file)
            for fetch in self._fetches
            if not fetch.has_content
        }
        folder = self._repo.path
        while not folder.is_dir():
            folder = folder.parent
        needed = sum(missing.values()) + DISK_MARGIN_BYTES
        return DiskFullError(needed, shutil.disk_usage(folder).free)

    def _reporter(
        self, on_progress: OnProgress, on_moved: Callable[[], None]
    ) -> Callable[[], None]:
        """A function that reports what is new since it was last called."""
        last_progress: DownloadProgress | None = None
        last_movement: tuple[int, int] | None = None

        def report() -> None:
            nonlocal last_progress, last_movement
            movement = self._movements, sum(fetch.bytes_present for fetch in self._fetches)
            progress = self._progress(movement[1])
            if movement != last_movement:
                on_moved()
            if progress != last_progress:
                on_progress(progress)
            last_movement, last_progress = movement, progress

        return report

    def _progress(self, present: int) -> DownloadProgress:
        return DownloadProgress(
            downloaded_bytes=present,
            total_bytes=self._plan.total_bytes,
            completed_files=sum(fetch.has_content for fetch in self._fetches),
            total_files=len(self._fetches),
            bytes_per_second=self._rate.update(present),
            files=tuple(
                FileProgress(fetch.file.path, fetch.bytes_present, fetch.file.size_bytes)
                for fetch in self._fetches
                if fetch.active
            ),
            resumed_bytes=sum(fetch.resumed_bytes for fetch in self._fetches),
            refetched_bytes=sum(fetch.refetched_bytes for fetch in self._fetches),
        )

    def _moved(self, _bytes: int) -> None:
        self._movements += 1
        self._check()

    def _wait(self, seconds: float) -> None:
        self._moved(0)
        self._stopped.wait(seconds)
        self._moved(0)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Another file of the download failed."""
