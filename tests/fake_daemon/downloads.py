"""The fake's downloads: steps of bytes, shared by all who wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from loaderd.v1 import cache_pb2
from tests.fake_daemon.cache import FILES, TOTAL, Cache
from tests.fake_daemon.failure import FailureError

CHUNK = 8_000_000
RATE = 25_000_000


def download_steps() -> list[int]:
    """Bytes after each step of a download."""
    return [*range(0, TOTAL, CHUNK), TOTAL]


def download_progress(downloaded: int, resumed: int = 0) -> cache_pb2.DownloadProgress:
    """How far a download is whose files come one after the other, two at a time."""
    progress = cache_pb2.DownloadProgress(
        downloaded_bytes=downloaded,
        total_bytes=TOTAL,
        total_files=len(FILES),
        bytes_per_second=RATE if downloaded else 0,
        resumed_bytes=resumed,
    )
    left = downloaded
    for path, size in FILES.items():
        part = min(left, size)
        left -= part
        if part == size:
            progress.completed_files += 1
        elif len(progress.files) < 2:
            progress.files.add(path=path, downloaded_bytes=part, size_bytes=size)
    if downloaded:
        progress.remaining.FromMilliseconds((TOTAL - downloaded) * 1000 // RATE)
    return progress


class Download:
    """One download: each waiter moves it on."""

    def __init__(self, name: str, resumed: int) -> None:
        self.name = name
        self.resumed = resumed
        self.downloaded = resumed
        self.waiters = 0
        self.cancelled = threading.Event()

    @property
    def is_done(self) -> bool:
        return self.downloaded == TOTAL

    @property
    def progress(self) -> cache_pb2.DownloadProgress:
        return download_progress(self.downloaded, self.resumed)

    def advance(self) -> None:
        self.downloaded = min(self.downloaded + CHUNK, TOTAL)


class Downloads:
    """The downloads under way, by repository."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._downloads: dict[str, Download] = {}

    def repo_ids(self) -> set[str]:
        return set(self._downloads)

    def all(self) -> list[cache_pb2.Download]:
        with self._lock:
            return [
                cache_pb2.Download(model=each.name, progress=each.progress, waiters=each.waiters)
                for each in self._downloads.values()
            ]

    @contextmanager
    def join(self, name: str, repo_id: str) -> Iterator[Download]:
        """Finds or starts a download; what came is kept when the last one leaves before its end."""
        with self._lock:
            resumed = self._cache.orphans.get(repo_id, 0)
            download = self._downloads.setdefault(repo_id, Download(name, resumed))
            download.waiters += 1
        try:
            yield download
        finally:
            with self._lock:
                download.waiters -= 1
                if download.waiters == 0:
                    self._settle(repo_id, download)

    def cancel(self, name: str) -> cache_pb2.CancelDownloadResponse:
        """Stops a download.

        Raises:
            FailureError: The name is malformed.
        """
        repo_id = self._cache.check_name(name)
        if repo_id.startswith("/"):
            raise FailureError("INVALID_NAME", field="model", problem="is a local path")
        with self._lock:
            download = self._downloads.pop(repo_id, None)
            if download is None:
                return cache_pb2.CancelDownloadResponse()
            download.cancelled.set()
            return cache_pb2.CancelDownloadResponse(
                waiters=download.waiters, kept_bytes=download.downloaded
            )

    def _settle(self, repo_id: str, download: Download) -> None:
        if self._downloads.get(repo_id) is download:
            del self._downloads[repo_id]
        if download.is_done:
            self._cache.orphans.pop(repo_id, None)
            self._cache.cached.add(repo_id)
        elif download.downloaded:
            self._cache.orphans[repo_id] = download.downloaded
