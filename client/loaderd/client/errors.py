"""Errors of the SDK: one class per reason that the daemon gives, and three of its own.

All derive from `LoaderdError`. A reason that this release does not know, from a newer daemon,
comes as a plain `LoaderdError` with everything that the daemon sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self, overload

from grpc import StatusCode


class LoaderdError(Exception):
    """Base of all errors of the SDK. Its text says what went wrong and what to do.

    Attributes:
        code: The canonical gRPC code.
        reason: The daemon's reason, for example "MODEL_NOT_FOUND"; empty when it gave none.
        metadata: The fields of that reason, as the daemon sent them.
        retry_after: Seconds after which the daemon says that a retry makes sense, or None.
        request_id: The id of the failed call in the daemon's log; None if none was made.
    """

    code: StatusCode = StatusCode.UNKNOWN
    reason: str = ""

    def __init__(
        self,
        message: str,
        *,
        code: StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.reason = type(self).reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.request_id = request_id


class _TextField:
    """A field of `metadata` as an attribute; None when the daemon did not send it."""

    def __set_name__(self, owner: type[LoaderdError], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, error: None, owner: type[LoaderdError]) -> Self: ...
    @overload
    def __get__(self, error: LoaderdError, owner: type[LoaderdError]) -> str | None: ...
    def __get__(self, error: LoaderdError | None, owner: type[LoaderdError]) -> Self | str | None:
        return self if error is None else error.metadata.get(self._name)


class _NumberField:
    """Like `_TextField`, for whole numbers."""

    def __set_name__(self, owner: type[LoaderdError], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, error: None, owner: type[LoaderdError]) -> Self: ...
    @overload
    def __get__(self, error: LoaderdError, owner: type[LoaderdError]) -> int | None: ...
    def __get__(self, error: LoaderdError | None, owner: type[LoaderdError]) -> Self | int | None:
        if error is None:
            return self
        value = error.metadata.get(self._name, "")
        return int(value) if value.isdecimal() else None


class _FieldError(LoaderdError, ValueError):
    """A bad value: a `field` of the request, and its `problem`."""

    code = StatusCode.INVALID_ARGUMENT
    field = _TextField()
    problem = _TextField()

    @classmethod
    def of(cls, field: str, problem: str) -> Self:
        """The error that the SDK itself raises, before it asks the daemon."""
        return cls(f"{field}: {problem}", metadata={"field": field, "problem": problem})


class ModelNotFoundError(LoaderdError):
    """The hub has no such repository, or the daemon's box no such folder."""

    code = StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"
    model = _TextField()


class RevisionNotFoundError(LoaderdError):
    """The repository has no such branch, tag or commit."""

    code = StatusCode.NOT_FOUND
    reason = "REVISION_NOT_FOUND"
    model = _TextField()
    revision = _TextField()


class ModelGatedError(LoaderdError):
    """The repository's terms were not accepted with the account of the daemon's hub token."""

    code = StatusCode.PERMISSION_DENIED
    reason = "MODEL_GATED"
    model = _TextField()


class InvalidNameError(_FieldError):
    """A model name, revision or path is malformed or outside what the daemon may read."""

    reason = "INVALID_NAME"


class InvalidArgumentError(_FieldError):
    """A value is missing, malformed or out of bounds."""

    reason = "INVALID_ARGUMENT"


class UnsupportedOptionError(_FieldError):
    """A well-formed value that this model, engine or daemon cannot honour."""

    reason = "UNSUPPORTED_OPTION"


class HubUnreachableError(LoaderdError):
    """The hub did not answer the daemon, or not in time."""

    code = StatusCode.UNAVAILABLE
    reason = "HUB_UNREACHABLE"
    model = _TextField()


class HubRateLimitedError(LoaderdError):
    """The hub asks the daemon to wait."""

    code = StatusCode.UNAVAILABLE
    reason = "HUB_RATE_LIMITED"
    model = _TextField()


class OfflineNotCachedError(LoaderdError):
    """The daemon is offline and its cache lacks the model."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "OFFLINE_NOT_CACHED"
    model = _TextField()


class ModelInUseError(LoaderdError):
    """The model is answering requests, is held by leases, or is still loading."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_IN_USE"
    model = _TextField()
    active_requests = _NumberField()
    active_leases = _NumberField()


class ModelNotLoadedError(LoaderdError):
    """The model is not loaded, or is being unloaded."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_NOT_LOADED"
    model = _TextField()


class ModelUnsupportedError(LoaderdError):
    """The model's files are whole, but the daemon cannot serve them."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_UNSUPPORTED"
    model = _TextField()
    problem = _TextField()


class SnapshotCorruptError(LoaderdError):
    """A file's content is not what its header, hash or index says."""

    code = StatusCode.DATA_LOSS
    reason = "SNAPSHOT_CORRUPT"
    model = _TextField()
    file = _TextField()
    expected = _TextField()
    found = _TextField()


class SnapshotIncompleteError(LoaderdError):
    """A file that the snapshot needs is not there."""

    code = StatusCode.DATA_LOSS
    reason = "SNAPSHOT_INCOMPLETE"
    model = _TextField()
    file = _TextField()


class DiskFullError(LoaderdError):
    """The cache's disk cannot hold the download."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "DISK_FULL"
    needed_bytes = _NumberField()
    free_bytes = _NumberField()


class DeviceMemoryError(LoaderdError):
    """The device's memory cannot hold the model or the request."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "DEVICE_MEMORY"
    model = _TextField()
    needed_bytes = _NumberField()
    free_bytes = _NumberField()
    holders = _TextField()
    bounded = _TextField()


class QueueFullError(LoaderdError):
    """The model's queue is full."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    model = _TextField()
    limit = _NumberField()


class SlowConsumerError(LoaderdError):
    """The stream was read too slowly, and the daemon's bound for it was reached."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_CONSUMER"
    limit = _NumberField()


class WorkerDiedError(LoaderdError):
    """The process that held the model ended or stopped answering."""

    code = StatusCode.UNAVAILABLE
    reason = "WORKER_DIED"
    model = _TextField()


class DrainingError(LoaderdError):
    """The daemon is shutting down."""

    code = StatusCode.UNAVAILABLE
    reason = "DRAINING"


class DeadlineError(LoaderdError):
    """The call's deadline passed, at the daemon or here."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"


class InternalError(LoaderdError):
    """A defect of the daemon; its log has the cause under `incident`."""

    code = StatusCode.INTERNAL
    reason = "INTERNAL"
    incident = _TextField()


class HubUnauthorizedError(LoaderdError):
    """The hub does not accept the daemon's token, or wants one and the daemon has none."""

    code = StatusCode.PERMISSION_DENIED
    reason = "HUB_UNAUTHORIZED"
    model = _TextField()


class SnapshotNotFoundError(LoaderdError):
    """The cache has no such snapshot."""

    code = StatusCode.NOT_FOUND
    reason = "SNAPSHOT_NOT_FOUND"
    model = _TextField()


class SnapshotInUseError(LoaderdError):
    """A loaded model or a download uses the snapshot."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "SNAPSHOT_IN_USE"
    model = _TextField()
    holders = _TextField()


class CacheLimitError(LoaderdError):
    """The download does not fit below the operator's limit of the cache's size."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "CACHE_LIMIT"
    needed_bytes = _NumberField()
    max_bytes = _NumberField()
    held_bytes = _NumberField()


class CacheNotWritableError(LoaderdError):
    """The daemon cannot write to its cache."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "CACHE_NOT_WRITABLE"
    problem = _TextField()


class DownloadCancelledError(LoaderdError):
    """Somebody stopped the download."""

    code = StatusCode.ABORTED
    reason = "DOWNLOAD_CANCELLED"
    model = _TextField()


class DownloadInterruptedError(LoaderdError):
    """The process that downloaded was ended from outside."""

    code = StatusCode.UNAVAILABLE
    reason = "DOWNLOAD_INTERRUPTED"
    model = _TextField()


class LeaseNotFoundError(LoaderdError):
    """The lease has ended, or holds another model."""

    code = StatusCode.NOT_FOUND
    reason = "LEASE_NOT_FOUND"
    lease = _TextField()


class UnauthenticatedError(LoaderdError):
    """The call carries no credentials that the daemon knows: a token or a client certificate."""

    code = StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"
    problem = _TextField()


class ForbiddenError(LoaderdError):
    """The role that the daemon's operator gave this client does not allow the call."""

    code = StatusCode.PERMISSION_DENIED
    reason = "FORBIDDEN"
    client = _TextField()
    role = _TextField()
    action = _TextField()


class ClientLimitError(LoaderdError):
    """This client has reached one of the limits that the daemon's operator set for it."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "CLIENT_LIMIT"
    client = _TextField()
    limit = _TextField()
    most = _NumberField()


class ModelNotAllowedError(LoaderdError):
    """The daemon's operator does not allow this model."""

    code = StatusCode.PERMISSION_DENIED
    reason = "MODEL_NOT_ALLOWED"
    model = _TextField()


class ModelTooLargeError(LoaderdError):
    """The model is larger than the daemon's operator allows."""

    code = StatusCode.PERMISSION_DENIED
    reason = "MODEL_TOO_LARGE"
    model = _TextField()
    size_bytes = _NumberField()
    max_bytes = _NumberField()


class ModelUnloadedError(LoaderdError):
    """Somebody unloaded the model by force while the call used it, or waited for its load.

    The same call again may load it again, which only makes sense if it is not to stay unloaded.
    """

    code = StatusCode.ABORTED
    reason = "MODEL_UNLOADED"
    model = _TextField()


class DaemonUnreachableError(LoaderdError):
    """No daemon answers at the address, or the connection to it was lost."""

    code = StatusCode.UNAVAILABLE


class CallCancelledError(LoaderdError):
    """The call was cancelled: by `cancel()`, or by closing its client."""

    code = StatusCode.CANCELLED


class UnexpectedAnswerError(LoaderdError):
    """The server's answer breaks the contract loaderd.v1: another or an incompatible server."""

    code = StatusCode.INTERNAL


BY_REASON: dict[str, type[LoaderdError]] = {
    kind.reason: kind
    for kind in (*LoaderdError.__subclasses__(), *_FieldError.__subclasses__())
    if kind.reason
}
"""The error classes by the daemon's reason."""
