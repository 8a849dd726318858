"""One file on its way from the hub into the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import TYPE_CHECKING

from loaderd.server.errors import SnapshotCorruptError, SnapshotIncompleteError
from loaderd.server.store.blobs import SnapshotFiles
from loaderd.server.store.digests import stamp_of
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_cache import blob_lock, link
from loaderd.server.store.hub_errors import is_disk_full
from loaderd.server.store.hub_guard import Exchange, HubBusyError, guard
from loaderd.server.store.partial_blob import PartialBlob
from loaderd.server.store.plan import PlannedFile

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_TOO_LONG = "a longer content"


class FileFetch:
    """Brings one file of a snapshot, unless it is there.

    What comes is hashed as it comes, and has its blob's name only when it is whole and right. A
    file whose fetch fails keeps what came of it; the next one goes on from there.

    Args:
        files: The snapshot.
        commit: Its commit.
        file: The file.
        access: The hub.
        distrusted: Whether its content is bad although size and header are right.
        moved: Called whenever something happened; what it raises ends the fetch.
        wait: Waits for so many seconds, or raises.
        check: Called while nothing happens; what it raises ends the fetch.

    Attributes:
        file: The file.
        active: Whether it is being fetched now.
        has_content: Whether the cache has its content, so that at most a link is missing.
        stamp: The stamp of its blob when that was hashed and is right, else None.
        resumed_bytes: What an earlier download left of it and was not fetched again.
        refetched_bytes: What had come of it and is fetched again.
    """

    def __init__(
        self,
        files: SnapshotFiles,
        commit: str,
        file: PlannedFile,
        access: HubAccess,
        *,
        distrusted: bool,
        moved: Callable[[int], None],
        wait: Callable[[float], None],
        check: Callable[[], None],
    ) -> None:
        self.file = file
        self.active = False
        self.has_content = False
        self.stamp: str | None = None
        self.resumed_bytes = 0
        self.refetched_bytes = 0
        self._files = files
        self._commit = commit
        self._access = access
        self._distrusted = distrusted
        self._moved = moved
        self._wait = wait
        self._check = check
        self._partial: PartialBlob | None = None

    def look(self) -> None:
        """Looks whether the cache has the content; takes away what is wrong with it."""
        self.has_content = not self._distrusted and self._files.is_whole(self.file)
        if not self.has_content and self._files.has_any(self.file):
            with self._lock():
                self.stamp = self._files.discard(self.file, self._moved)
            self.has_content = self.stamp is not None
        self._distrusted = False  # what is there from now on is good

    @property
    def bytes_present(self) -> int:
        """How much of it is on disk, whoever brought that."""
        if self.has_content:
            return self.file.size_bytes
        if self._distrusted:
            return self._files.partial_bytes(self.file)
        waits = self.active and self._partial is None
        return self._files.bytes_present(self.file, of_others=waits)

    def run(self) -> None:
        """Brings it.

        Raises:
            SnapshotCorruptError: What came is not what the hub's listing says.
            SnapshotIncompleteError: The hub listed the file and does not have it.
            HubBusyError, httpx2.HTTPError, OSError: As they are.
        """
        pointer, blob = self._files.pointer(self.file), self._files.blob(self.file)
        if self.has_content and pointer.exists():
            return
        self.active = not self.has_content
        try:
            with self._lock():
                # Others may have brought it meanwhile, or taken it away.
                if not (self.has_content and blob.is_file()):
                    self.stamp = self._files.prove(self.file, self._moved)
                    self.has_content = self.stamp is not None
                fetched = not self.has_content
                if fetched:
                    self.active = True
                    self._fetch()
                    self.stamp = stamp_of(blob)
                    self.has_content = True
                link(pointer, blob, new=fetched)
        finally:
            self.active = False

    def drop_partial(self) -> None:
        """Frees the disk of what is coming; for when the download has failed."""
        if self._partial is not None:
            self._partial.delete()

    def _lock(self) -> AbstractContextManager[None]:
        return blob_lock(self._files.repo.lock(self.file.digest), self._check)

    def _fetch(self) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        file, files = self.file, self._files
        model = files.repo.repo_id
        exchange = Exchange(
            self._access.endpoint, model, self._commit, file, on_response=lambda: self._moved(0)
        )
        files.repo.blobs.mkdir(parents=True, exist_ok=True)
        path = files.partial(file)
        try:
            with guard(exchange), PartialBlob(path, file.size_bytes, file.digest) as partial:
                self._partial = partial
                partial.take_over(self._moved)
                self.resumed_bytes = partial.received
                self._complete(partial)
                partial.publish(files.blob(file))
        except HfHubHTTPError as error:
            if _lacks_file(error):
                raise SnapshotIncompleteError(model, file.path) from None
            raise
        except OSError as error:
            if is_disk_full(error):
                self.drop_partial()
            raise
        finally:
            self._partial = None

    def _complete(self, partial: PartialBlob) -> None:
        """Fetches what is missing. What an earlier download left may be wrong: then all of it."""
        file = self.file
        while (found := self._receive(partial)) != file.digest:
            blameless = self.resumed_bytes > 0
            self._start_over(partial)
            if not blameless:
                raise SnapshotCorruptError(self._files.repo.repo_id, file.path, file.digest, found)

    def _receive(self, partial: PartialBlob) -> str:
        """Fetches until nothing is missing; returns what the content hashes to."""
        import httpx2

        try:
            self._access.retry.call(
                lambda: self._ask(partial),
                on=(HubBusyError, httpx2.TransportError, _BrokenOffError),
                wait=self._wait,
                reached=lambda: partial.received,
            )
        except _TooLongError:
            return _TOO_LONG
        return partial.found

    def _ask(self, partial: PartialBlob) -> None:
        """One request for what is missing."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        start, size = partial.received, self.file.size_bytes
        if start == size:
            return
        url = hf_hub_url(
            self._files.repo.repo_id,
            self.file.path,
            revision=self._commit,
            endpoint=self._access.endpoint,
        )
        headers = build_hf_headers(token=self._access.library_token)
        if start:
            headers["Range"] = f"bytes={start}-"
        with get_session().stream("GET", url, headers=headers) as response:
            if start and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._start_over(partial)
                raise _BrokenOffError("the hub does not go on where a file broke off")
            hf_raise_for_status(response)
            if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
                self._start_over(partial)
            for data in response.iter_bytes():
                self._moved(len(data))
                if partial.received + len(data) > size:
                    raise _TooLongError
                partial.write(data)
        if partial.received < size:
            raise _BrokenOffError("the hub ended a file too early")

    def _start_over(self, partial: PartialBlob) -> None:
        self.refetched_bytes += partial.received
        self.resumed_bytes = 0
        partial.start_over()


def _lacks_file(error: HfHubHTTPError) -> bool:
    """Whether the hub has not got a file that it listed, which it need not say in so many words."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if isinstance(error, RemoteEntryNotFoundError):
        return True
    response = error.response
    return response.status_code == HTTPStatus.NOT_FOUND and "x-error-code" not in response.headers


class _BrokenOffError(Exception):
    """The rest of the file is to be asked for again."""


class _TooLongError(Exception):
    """More came than the listing promises."""
