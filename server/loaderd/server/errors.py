"""Errors of the domain. They know their reason and its fields, and nothing of gRPC.

One class per value of `loaderd.v1.ErrorReason`. `rpc/status.py` turns them into a
`google.rpc.Status`; the worker sends them to the daemon as reason and metadata. The
texts are fixed: whatever a client sees is made of these sentences and the fields.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, get_type_hints

from loaderd.v1.errors_pb2 import ErrorReason

_PREFIX = "ERROR_REASON_"
_LONGEST_FIELD = 160  # a status travels in a header, and what a client sent may be long


@dataclass(eq=False)
class LoaderdError(Exception):
    """Base of all domain errors.

    Attributes:
        reason: Name of the `ErrorReason` without its prefix.
        text: The sentence for people; the error's fields fill its braces, bytes as a size.
    """

    reason: ClassVar[str]
    text: ClassVar[str]

    def __str__(self) -> str:
        return self.text.format(
            **{f.name: _shown(f.name, getattr(self, f.name)) for f in fields(self)}
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The fields as strings, without those that are not known."""
        values = {f.name: _shortened(getattr(self, f.name)) for f in fields(self)}
        return {name: str(value) for name, value in values.items() if value is not None}

    @property
    def number(self) -> ErrorReason.ValueType:
        """The reason as a value of `loaderd.v1.ErrorReason`."""
        return ErrorReason.Value(_PREFIX + self.reason)

    @staticmethod
    def from_metadata(number: ErrorReason.ValueType, metadata: dict[str, str]) -> LoaderdError:
        """The error that another process described; the inverse of the two properties.

        Raises:
            KeyError: No error has this reason, or a field of it is missing.
        """
        kind = BY_REASON[ErrorReason.Name(number).removeprefix(_PREFIX)]
        hints = get_type_hints(kind)
        given = [f.name for f in fields(kind) if f.default is MISSING or f.name in metadata]
        numbers = {name for name in given if hints[name] in (int, int | None)}
        return kind(**{name: (int if name in numbers else str)(metadata[name]) for name in given})


@dataclass(eq=False)
class ModelNotFoundError(LoaderdError):
    """The hub has no such repository, or there is no such folder."""

    reason = "MODEL_NOT_FOUND"
    text = "model {model!r} was not found; {advice}"
    model: str

    def __str__(self) -> str:
        advice = "check the spelling, and for a private repository the daemon's hub token"
        if self.model.startswith("/"):
            advice = "the daemon's box has no such folder, and no such GGUF file"
        return self.text.format(model=_shortened(self.model), advice=advice)


@dataclass(eq=False)
class RevisionNotFoundError(LoaderdError):
    """The repository has no such branch, tag or commit."""

    reason = "REVISION_NOT_FOUND"
    text = "model {model!r} has no revision {revision!r}"
    model: str
    revision: str


@dataclass(eq=False)
class ModelGatedError(LoaderdError):
    """The repository's terms were not accepted with the daemon's token."""

    reason = "MODEL_GATED"
    text = (
        "model {model!r} is gated; accept its terms on the hub and give the daemon a token "
        "that may read it"
    )
    model: str


@dataclass(eq=False)
class InvalidNameError(LoaderdError):
    """A model name, revision or path is malformed or out of bounds."""

    reason = "INVALID_NAME"
    text = "{field}: {problem}"
    field: str
    problem: str


@dataclass(eq=False)
class InvalidArgumentError(LoaderdError):
    """A field's value is missing, malformed or out of bounds."""

    reason = "INVALID_ARGUMENT"
    text = "{field}: {problem}"
    field: str
    problem: str


@dataclass(eq=False)
class UnsupportedOptionError(LoaderdError):
    """A well-formed value that this model, engine or daemon cannot honour."""

    reason = "UNSUPPORTED_OPTION"
    text = "{field}: {problem}"
    field: str
    problem: str


@dataclass(eq=False)
class HubUnreachableError(LoaderdError):
    """The hub did not answer, or not in time."""

    reason = "HUB_UNREACHABLE"
    text = "the hub could not be reached for {model!r}; try again, or check the daemon's network"
    model: str


@dataclass(eq=False)
class HubRateLimitedError(LoaderdError):
    """The hub asks to wait."""

    reason = "HUB_RATE_LIMITED"
    text = "the hub limits the rate of requests; try {model!r} again later"
    model: str


@dataclass(eq=False)
class OfflineNotCachedError(LoaderdError):
    """The daemon is offline and its cache lacks the model."""

    reason = "OFFLINE_NOT_CACHED"
    text = (
        "model {model!r} is not in the cache and the daemon is offline; start it without --offline"
    )
    model: str


@dataclass(eq=False)
class ModelInUseError(LoaderdError):
    """The model is answering requests, is held by leases, or is still loading."""

    reason = "MODEL_IN_USE"
    text = (
        "model {model!r} is loading or in use ({active_requests} requests, "
        "{active_leases} leases); wait, or unload with force"
    )
    model: str
    active_requests: int
    active_leases: int


@dataclass(eq=False)
class ModelNotLoadedError(LoaderdError):
    """The model is not loaded, or is being unloaded."""

    reason = "MODEL_NOT_LOADED"
    text = "model {model!r} is not loaded; load it first"
    model: str


@dataclass(eq=False)
class ModelUnsupportedError(LoaderdError):
    """The files are whole, but cannot be served."""

    reason = "MODEL_UNSUPPORTED"
    text = "model {model!r} cannot be served: {problem}"
    model: str
    problem: str


@dataclass(eq=False)
class SnapshotCorruptError(LoaderdError):
    """A file's content is not what its header, hash or index says."""

    reason = "SNAPSHOT_CORRUPT"
    text = "{file!r} of {model!r} is corrupt: expected {expected}, found {found}; fetch it again"
    model: str
    file: str
    expected: str
    found: str


@dataclass(eq=False)
class SnapshotIncompleteError(LoaderdError):
    """A file that the snapshot needs is not there."""

    reason = "SNAPSHOT_INCOMPLETE"
    text = "{file!r} of {model!r} is missing; fetch the model again"
    model: str
    file: str


@dataclass(eq=False)
class DiskFullError(LoaderdError):
    """The cache's disk cannot hold the download."""

    reason = "DISK_FULL"
    text = "the cache's disk needs {needed_bytes} for this, {free_bytes} are free"
    needed_bytes: int
    free_bytes: int


@dataclass(eq=False)
class DeviceMemoryError(LoaderdError):
    """The device's memory cannot hold the model or the request.

    Attributes:
        model: The model.
        needed_bytes: What it would take; None where a device only said that it is full.
        free_bytes: What could be had.
        holders: Who has the rest, such as "org/a (2.1 GB), org/b (0.3 GB)".
        bounded: The devices of which the caller's max_memory allows less than could be had.
    """

    reason = "DEVICE_MEMORY"
    text = "not enough device memory for {model!r}{numbers}; {first} or choose another device"
    model: str
    needed_bytes: int | None = None
    free_bytes: int | None = None
    holders: str | None = None
    bounded: str | None = None

    def __str__(self) -> str:
        told = []
        if self.needed_bytes is not None:
            told.append(f"{size(self.needed_bytes)} are needed")
        by_whom = "" if self.bounded is None else f" by your max_memory of {self.bounded}"
        if self.free_bytes is not None:
            told.append(f"{size(self.free_bytes)} are free{by_whom}")
        if self.holders is not None:
            told.append(f"held by {_shortened(self.holders)}")
        first = "unload another model" if self.bounded is None else "raise max_memory"
        numbers = f": {', '.join(told)}" if told else ""
        return self.text.format(model=_shortened(self.model), numbers=numbers, first=first)


@dataclass(eq=False)
class QueueFullError(LoaderdError):
    """The model's queue is full."""

    reason = "QUEUE_FULL"
    text = "model {model!r} has {limit} requests, or leases, already, its limit; try again later"
    model: str
    limit: int


@dataclass(eq=False)
class SlowConsumerError(LoaderdError):
    """The client reads its stream too slowly."""

    reason = "SLOW_CONSUMER"
    text = "the stream was read too slowly: more than {limit} {unit} waited for it"
    limit: int
    unit: str


@dataclass(eq=False)
class WorkerDiedError(LoaderdError):
    """The process that holds the model ended or stopped answering."""

    reason = "WORKER_DIED"
    text = "the process that worked on {model!r} ended; try again"
    model: str


@dataclass(eq=False)
class DrainingError(LoaderdError):
    """The daemon is shutting down."""

    reason = "DRAINING"
    text = "the daemon is shutting down; try again when it is back"


@dataclass(eq=False)
class DeadlineError(LoaderdError):
    """The call's deadline passed."""

    reason = "DEADLINE"
    text = "the deadline passed"


@dataclass(eq=False)
class InternalError(LoaderdError):
    """A defect of the daemon; its log has the cause."""

    reason = "INTERNAL"
    text = "internal error; the daemon's log has the cause under incident {incident}"
    incident: str


@dataclass(eq=False)
class HubUnauthorizedError(LoaderdError):
    """The hub does not accept the daemon's token, or wants one."""

    reason = "HUB_UNAUTHORIZED"
    text = (
        "the hub refuses the daemon's token for {model!r}, or wants one; give the daemon a valid "
        "token that may read it, with HF_TOKEN or --hub-token-file"
    )
    model: str


@dataclass(eq=False)
class SnapshotNotFoundError(LoaderdError):
    """The cache has no such snapshot."""

    reason = "SNAPSHOT_NOT_FOUND"
    text = "the cache has no snapshot of {model!r}"
    model: str


@dataclass(eq=False)
class SnapshotInUseError(LoaderdError):
    """A loaded model or a download uses the snapshot."""

    reason = "SNAPSHOT_IN_USE"
    text = "the snapshot of {model!r} is in use by {holders}; unload it, or wait, then try again"
    model: str
    holders: str


@dataclass(eq=False)
class CacheLimitError(LoaderdError):
    """The download does not fit below the operator's limit of the cache's size."""

    reason = "CACHE_LIMIT"
    text = (
        "the download needs {needed_bytes}, the cache may hold {max_bytes}, and "
        "{held_bytes} of it cannot be deleted now; unload models that use it, or raise "
        "--cache-max-bytes"
    )
    needed_bytes: int
    max_bytes: int
    held_bytes: int


@dataclass(eq=False)
class CacheNotWritableError(LoaderdError):
    """The cache cannot be written to."""

    reason = "CACHE_NOT_WRITABLE"
    text = "the daemon cannot write to its cache ({problem}); check its owner, mode and disk"
    problem: str


@dataclass(eq=False)
class DownloadCancelledError(LoaderdError):
    """Somebody stopped the download."""

    reason = "DOWNLOAD_CANCELLED"
    text = "the download of {model!r} was cancelled by another call; start it again to go on"
    model: str


@dataclass(eq=False)
class DownloadInterruptedError(LoaderdError):
    """The process that downloaded was ended from outside."""

    reason = "DOWNLOAD_INTERRUPTED"
    text = "the process that downloaded {model!r} was killed; start it again to go on"
    model: str


@dataclass(eq=False)
class LeaseNotFoundError(LoaderdError):
    """The lease has ended, or holds another model."""

    reason = "LEASE_NOT_FOUND"
    text = "there is no lease {lease!r} on this model; it has ended, acquire another"
    lease: str


@dataclass(eq=False)
class UnauthenticatedError(LoaderdError):
    """The call carries no credentials that the daemon knows."""

    reason = "UNAUTHENTICATED"
    text = "the daemon does not know who calls: {problem}"
    problem: str


@dataclass(eq=False)
class ForbiddenError(LoaderdError):
    """The caller's role does not allow the call."""

    reason = "FORBIDDEN"
    text = "{client!r} has the role {role}, which may not {action}; ask the daemon's operator"
    client: str
    role: str
    action: str


@dataclass(eq=False)
class ClientLimitError(LoaderdError):
    """The client has reached one of its limits.

    Attributes:
        client: Its name.
        limit: Which one: streams, requests, tokens_per_minute or models.
        most: What it may have.
        retry_after_s: Seconds after which it is worth to try again.
    """

    reason = "CLIENT_LIMIT"
    text = "{client!r} has reached its limit of {most} {limit}; try again later"
    client: str
    limit: str
    most: int
    retry_after_s: int


@dataclass(eq=False)
class ModelNotAllowedError(LoaderdError):
    """The operator does not allow this model."""

    reason = "MODEL_NOT_ALLOWED"
    text = "the daemon's operator does not allow model {model!r}"
    model: str


@dataclass(eq=False)
class ModelTooLargeError(LoaderdError):
    """The model is larger than the operator allows."""

    reason = "MODEL_TOO_LARGE"
    text = "model {model!r} has {size_bytes}, and the daemon's operator allows {max_bytes}"
    model: str
    size_bytes: int
    max_bytes: int


@dataclass(eq=False)
class ModelUnloadedError(LoaderdError):
    """Somebody unloaded the model by force while the call used it, or waited for its load."""

    reason = "MODEL_UNLOADED"
    text = (
        "model {model!r} was unloaded by force while this call used it; try again only if it is "
        "to be loaded again"
    )
    model: str


BY_REASON: dict[str, type[LoaderdError]] = {
    kind.reason: kind for kind in LoaderdError.__subclasses__()
}
"""The error classes by reason."""


def size(count: int) -> str:
    """Bytes for people, such as "38.0 MB" or "2.13 GB"."""
    if count < 1000:
        return f"{count} bytes"
    for unit, scale, digits in (("kB", 1e3, 1), ("MB", 1e6, 1), ("GB", 1e9, 2)):
        if count < 999.95 * scale:
            return f"{count / scale:.{digits}f} {unit}"
    return f"{count / 1e12:.2f} TB"


def _shown(field: str, value: str | int | None) -> str | int | None:
    if field.endswith("_bytes") and isinstance(value, int):
        return size(value)
    return _shortened(value)


def _shortened(value: str | int | None) -> str | int | None:
    if isinstance(value, str) and len(value) > _LONGEST_FIELD:
        return value[: _LONGEST_FIELD - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return value
