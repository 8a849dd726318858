"""What the hub library's errors mean to us."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from loaderd.server.errors import (
    CacheNotWritableError,
    HubRateLimitedError,
    HubUnauthorizedError,
    HubUnreachableError,
    LoaderdError,
    ModelGatedError,
    ModelNotFoundError,
    ModelUnsupportedError,
    OfflineNotCachedError,
    RevisionNotFoundError,
)
from loaderd.server.store.cache import NOT_WRITABLE
from loaderd.server.store.hub_guard import HubBusyError
from loaderd.server.store.names import HubName

if TYPE_CHECKING:
    import httpx2

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or the user's share of it, is full."""
    return any(isinstance(e, OSError) and e.errno in _NO_SPACE for e in _chain(error))


def domain_error(error: BaseException, name: HubName) -> LoaderdError | None:
    """The domain error that an error of the hub library stands for; None for a defect.

    The library wraps what really happened, sometimes twice, so causes are looked at too.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    for cause in _chain(error):
        if (meaning := _meaning(cause, name)) is not None:
            return meaning
    if isinstance(error, LocalEntryNotFoundError):
        return HubUnreachableError(str(name))
    return None


def _meaning(error: BaseException, name: HubName) -> LoaderdError | None:
    import httpx2
    from huggingface_hub import errors as hub

    meaning: LoaderdError | None = None
    match error:
        case LoaderdError():
            meaning = error
        case HubBusyError(rate_limited=True):
            meaning = HubRateLimitedError(str(name))
        case hub.GatedRepoError():
            meaning = ModelGatedError(name.repo_id)
        case hub.RepositoryNotFoundError() if _is_bare_denial(error.response):
            meaning = HubUnauthorizedError(name.repo_id)
        case hub.RepositoryNotFoundError():
            meaning = ModelNotFoundError(name.repo_id)
        case hub.RevisionNotFoundError():
            meaning = RevisionNotFoundError(name.repo_id, name.revision)
        case hub.DisabledRepoError():
            meaning = ModelUnsupportedError(name.repo_id, "the hub has disabled its repository")
        case hub.HfHubHTTPError():
            meaning = _by_status(error.response.status_code, name)
        case hub.OfflineModeIsEnabled():
            meaning = OfflineNotCachedError(str(name))
        case HubBusyError() | httpx2.HTTPError() | hub.FileMetadataError():
            meaning = HubUnreachableError(str(name))
        case OSError() if error.errno in NOT_WRITABLE:
            meaning = CacheNotWritableError(os.strerror(error.errno))
    return meaning


def _is_bare_denial(response: httpx2.Response) -> bool:
    """Whether the hub denies without a reason; the library guesses that there is nothing."""
    return response.status_code == HTTPStatus.UNAUTHORIZED and not response.headers.get(
        "x-error-code"
    )


def _by_status(status: int, name: HubName) -> LoaderdError:
    """For answers that do not say what is wrong."""
    match status:
        case 401 | 403:
            return HubUnauthorizedError(name.repo_id)
        case 404:
            return ModelNotFoundError(name.repo_id)
        case _:
            return HubUnreachableError(str(name))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
