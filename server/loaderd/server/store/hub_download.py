"""A plan's files on their way from the hub into the cache."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from loaderd.server.errors import (
    DiskFullError,
    LoaderdError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.blobs import SnapshotFiles
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_errors import is_disk_full
from loaderd.server.store.hub_guard import Exchange, HubBusyError, guard
from loaderd.server.store.plan import DownloadPlan, DownloadProgress, PlannedFile

PARALLEL_FILES = 8

DISK_MARGIN_BYTES = 64 << 20
"""What a download leaves free on the cache's disk."""

OnProgress = Callable[[DownloadProgress], None]

_POLL_SECONDS = 0.1


class Download:
    """One download: its threads, and how far they are."""

    def __init__(self, plan: DownloadPlan, cache_dir: Path, access: HubAccess) -> None:
        self._plan = plan
        self._repo = RepoFolder(cache_dir, plan.repo_id)
        self._files = SnapshotFiles(self._repo, plan.commit)
        self._access = access
        self._missing: list[PlannedFile] = []
        self._stopped = threading.Event()
        self._movements = 0

    def run(self, on_progress: OnProgress) -> Path:
        """See `hub.download`."""
        plan = self._plan
        self._missing = [file for file in plan.files if not self._files.is_whole(file)]
        self._check_listing()
        for file in self._missing:
            self._files.discard(file, self.moved)
        self._check_disk()
        if plan.tree:
            self._repo.write_tree(plan.commit, plan.tree)
        # Weights come last: a snapshot that has them has everything.
        weights = [file for file in plan.files if file.path.endswith(".safetensors")]
        others = [file for file in plan.files if file not in weights]
        report = self._reporter(on_progress)
        report()
        pool = ThreadPoolExecutor(PARALLEL_FILES, "hub")
        try:
            for wave in (others, weights):
                self._await([pool.submit(self._fetch, file) for file in wave], report)
        except BaseException:
            self._stopped.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._repo.write_ref(plan.revision, plan.commit)
        return self._repo.snapshot(plan.commit)

    def moved(self, _bytes: int = 0) -> None:
        """Notes that the download is alive.

        Raises:
            _StoppedError: It shall end.
        """
        self._movements += 1
        if self._stopped.is_set():
            raise _StoppedError

    def _fetch(self, file: PlannedFile) -> None:
        import httpx2
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        plan = self._plan
        bar: Any = partial(_Meter, self._corrupt(file, "more"), file.size_bytes, self.moved)

        def fetch() -> None:
            hf_hub_download(
                plan.repo_id,
                file.path,
                revision=plan.commit,
                cache_dir=self._repo.cache_dir,
                endpoint=self._access.endpoint,
                token=self._access.library_token,
                tqdm_class=bar,
            )

        # Faults in mid-body the library mends itself; these are those before it.
        retried = (HubBusyError, httpx2.ReadError, httpx2.RemoteProtocolError)
        exchange = Exchange(
            self._access.endpoint, plan.repo_id, plan.commit, file, on_response=self.moved
        )
        try:
            with guard(exchange):
                self._access.retry.call(fetch, on=retried, wait=self._wait)
        except RemoteEntryNotFoundError:
            raise SnapshotIncompleteError(plan.repo_id, file.path) from None
        except OSError as error:
            if is_disk_full(error):
                raise self._disk_full() from error
            if type(error) is OSError and error.errno is None:  # the library's size check
                raise self._corrupt(file, "another number") from error
            raise
        if file in self._missing:
            self._files.verify(file, self.moved)

    def _await(self, futures: list[Future[None]], report: Callable[[], None]) -> None:
        """Waits for all, or for the first that fails."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            report()

    def _reporter(self, on_progress: OnProgress) -> Callable[[], None]:
        """A function that reports progress, if there was any since it was last called."""
        start = time.monotonic()
        at_start = self._present()[0]
        last: tuple[int, int, int] | None = None

        def report() -> None:
            nonlocal last
            present, completed = self._present()
            if (self._movements, present, completed) == last:
                return
            last = self._movements, present, completed
            elapsed = time.monotonic() - start
            on_progress(
                DownloadProgress(
                    downloaded_bytes=present,
                    total_bytes=self._plan.total_bytes,
                    completed_files=completed,
                    total_files=len(self._plan.files),
                    bytes_per_second=max(0, present - at_start) / elapsed if elapsed else 0.0,
                )
            )

        return report

    def _present(self) -> tuple[int, int]:
        """Bytes and whole files on disk, whoever brought them."""
        sizes = [self._files.bytes_present(file) for file in self._plan.files]
        whole = sum(a == b.size_bytes for a, b in zip(sizes, self._plan.files, strict=True))
        return sum(sizes), whole

    def _corrupt(self, file: PlannedFile, found: str) -> SnapshotCorruptError:
        return SnapshotCorruptError(
            self._plan.repo_id, file.path, f"{file.size_bytes} bytes", found
        )

    def _check_listing(self) -> None:
        """A commit never changes. If the hub says so, it is wrong where what we have is whole."""
        known = self._repo.read_tree(self._plan.commit) or {}
        for file in self._plan.files:
            entry = known.get(file.path)
            if entry is None or (entry.digest, entry.size) == (file.digest, file.size_bytes):
                continue
            if self._files.has_blob(entry.digest, self.moved):
                raise SnapshotCorruptError(
                    self._plan.repo_id, file.path, entry.digest, "another file of the same commit"
                )

    def _check_disk(self) -> None:
        full = self._disk_full()
        if self._missing and full.needed_bytes > full.free_bytes:
            raise full

    def _disk_full(self) -> DiskFullError:
        missing = sum(f.size_bytes - self._files.bytes_present(f) for f in self._missing)
        folder = self._repo.path
        while not folder.is_dir():
            folder = folder.parent
        return DiskFullError(missing + DISK_MARGIN_BYTES, shutil.disk_usage(folder).free)

    def _wait(self, seconds: float) -> None:
        self.moved()
        self._stopped.wait(seconds)
        self.moved()


class _Meter:
    """Stands in for the library's progress bar; ends a body that is longer than it should be."""

    def __init__(
        self, error: LoaderdError, limit: int, moved: Callable[[int], None], **_bar: object
    ) -> None:
        self._error = error
        self._limit = limit
        self._moved = moved
        self._received = 0

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, received: int) -> None:
        self._received += received
        if self._received > self._limit:
            raise self._error
        self._moved(received)


class _StoppedError(Exception):
    """Another file of the download failed."""
