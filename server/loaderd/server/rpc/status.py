"""Domain errors as google.rpc.Status, with the details that their reason calls for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from loaderd.server.errors import ClientLimitError, LoaderdError

DOMAIN = "loaderd"

_CODES = {
    "MODEL_NOT_FOUND": code_pb2.NOT_FOUND,
    "REVISION_NOT_FOUND": code_pb2.NOT_FOUND,
    "MODEL_GATED": code_pb2.PERMISSION_DENIED,
    "INVALID_NAME": code_pb2.INVALID_ARGUMENT,
    "INVALID_ARGUMENT": code_pb2.INVALID_ARGUMENT,
    "UNSUPPORTED_OPTION": code_pb2.INVALID_ARGUMENT,
    "HUB_UNREACHABLE": code_pb2.UNAVAILABLE,
    "HUB_RATE_LIMITED": code_pb2.UNAVAILABLE,
    "OFFLINE_NOT_CACHED": code_pb2.FAILED_PRECONDITION,
    "MODEL_IN_USE": code_pb2.FAILED_PRECONDITION,
    "MODEL_NOT_LOADED": code_pb2.FAILED_PRECONDITION,
    "MODEL_UNSUPPORTED": code_pb2.FAILED_PRECONDITION,
    "SNAPSHOT_CORRUPT": code_pb2.DATA_LOSS,
    "SNAPSHOT_INCOMPLETE": code_pb2.DATA_LOSS,
    "DISK_FULL": code_pb2.RESOURCE_EXHAUSTED,
    "DEVICE_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
    "QUEUE_FULL": code_pb2.RESOURCE_EXHAUSTED,
    "SLOW_CONSUMER": code_pb2.RESOURCE_EXHAUSTED,
    "WORKER_DIED": code_pb2.UNAVAILABLE,
    "DRAINING": code_pb2.UNAVAILABLE,
    "DEADLINE": code_pb2.DEADLINE_EXCEEDED,
    "INTERNAL": code_pb2.INTERNAL,
    "HUB_UNAUTHORIZED": code_pb2.PERMISSION_DENIED,
    "SNAPSHOT_NOT_FOUND": code_pb2.NOT_FOUND,
    "SNAPSHOT_IN_USE": code_pb2.FAILED_PRECONDITION,
    "CACHE_LIMIT": code_pb2.RESOURCE_EXHAUSTED,
    "CACHE_NOT_WRITABLE": code_pb2.FAILED_PRECONDITION,
    "DOWNLOAD_CANCELLED": code_pb2.ABORTED,
    "DOWNLOAD_INTERRUPTED": code_pb2.UNAVAILABLE,
    "LEASE_NOT_FOUND": code_pb2.NOT_FOUND,
    "UNAUTHENTICATED": code_pb2.UNAUTHENTICATED,
    "FORBIDDEN": code_pb2.PERMISSION_DENIED,
    "CLIENT_LIMIT": code_pb2.RESOURCE_EXHAUSTED,
    "MODEL_NOT_ALLOWED": code_pb2.PERMISSION_DENIED,
    "MODEL_TOO_LARGE": code_pb2.PERMISSION_DENIED,
    "MODEL_UNLOADED": code_pb2.ABORTED,
}
"""The gRPC code of each reason."""

_RETRY_AFTER_S = {
    "HUB_UNREACHABLE": 10,
    "HUB_RATE_LIMITED": 60,
    "QUEUE_FULL": 1,
    "WORKER_DIED": 1,
    "DRAINING": 5,
    "DOWNLOAD_INTERRUPTED": 1,
}


def status_of(error: LoaderdError, request_id: str) -> status_pb2.Status:
    """The status that a client gets for `error`.

    Args:
        error: The error.
        request_id: Of the call that it ends.
    """
    status = status_pb2.Status(code=_CODES[error.reason], message=str(error))
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: LoaderdError, request_id: str) -> Iterator[Message]:
    metadata = {**error.metadata, "request_id": request_id}
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if seconds := _retry_after_s(error):
        yield error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds))
    if describe := _DESCRIPTIONS.get(error.reason):
        yield describe(error)


def _retry_after_s(error: LoaderdError) -> int | None:
    if isinstance(error, ClientLimitError):
        return error.retry_after_s
    return _RETRY_AFTER_S.get(error.reason)


def _resource(error: LoaderdError) -> Message:
    details: Message = error_details_pb2.ResourceInfo(
        resource_type="model", resource_name=error.metadata["model"], description=str(error)
    )
    return details


def _lease(error: LoaderdError) -> Message:
    details: Message = error_details_pb2.ResourceInfo(
        resource_type="lease", resource_name=error.metadata["lease"], description=str(error)
    )
    return details


def _bad_request(error: LoaderdError) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.metadata["field"], description=error.metadata["problem"]
    )
    details: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return details


def _precondition(error: LoaderdError) -> Message:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=error.reason, subject=error.metadata.get("model", "cache"), description=str(error)
    )
    details: Message = error_details_pb2.PreconditionFailure(violations=[violation])
    return details


def _quota(error: LoaderdError) -> Message:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=error.metadata.get("model", "daemon"), description=str(error)
    )
    if isinstance(error, ClientLimitError):
        violation.subject = f"client:{error.client}"
    details: Message = error_details_pb2.QuotaFailure(violations=[violation])
    return details


_DESCRIPTIONS: dict[str, Callable[[LoaderdError], Message]] = {
    "MODEL_NOT_FOUND": _resource,
    "REVISION_NOT_FOUND": _resource,
    "MODEL_GATED": _resource,
    "INVALID_NAME": _bad_request,
    "INVALID_ARGUMENT": _bad_request,
    "UNSUPPORTED_OPTION": _bad_request,
    "OFFLINE_NOT_CACHED": _precondition,
    "MODEL_IN_USE": _precondition,
    "MODEL_NOT_LOADED": _precondition,
    "MODEL_UNSUPPORTED": _precondition,
    "DISK_FULL": _quota,
    "DEVICE_MEMORY": _quota,
    "QUEUE_FULL": _quota,
    "SLOW_CONSUMER": _quota,
    "HUB_UNAUTHORIZED": _resource,
    "SNAPSHOT_NOT_FOUND": _resource,
    "SNAPSHOT_IN_USE": _precondition,
    "CACHE_LIMIT": _quota,
    "CACHE_NOT_WRITABLE": _precondition,
    "LEASE_NOT_FOUND": _lease,
    "CLIENT_LIMIT": _quota,
    "MODEL_NOT_ALLOWED": _resource,
    "MODEL_TOO_LARGE": _resource,
}
