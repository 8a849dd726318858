"""Failures as google.rpc.Status, by the table in errors.proto."""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

RETRY_AFTER_S = 1.5
REQUEST_ID = "fake-request"


@dataclass(frozen=True)
class Reason:
    """What errors.proto says of one reason: its code, and an example of its metadata."""

    code: int
    metadata: dict[str, str] = field(default_factory=dict)
    retry: bool = False


REASONS = {
    "MODEL_NOT_FOUND": Reason(code_pb2.NOT_FOUND, {"model": "a/b"}),
    "REVISION_NOT_FOUND": Reason(code_pb2.NOT_FOUND, {"model": "a/b", "revision": "v9"}),
    "MODEL_GATED": Reason(code_pb2.PERMISSION_DENIED, {"model": "a/b"}),
    "INVALID_NAME": Reason(code_pb2.INVALID_ARGUMENT, {"field": "model", "problem": "is bad"}),
    "INVALID_ARGUMENT": Reason(code_pb2.INVALID_ARGUMENT, {"field": "n", "problem": "is bad"}),
    "UNSUPPORTED_OPTION": Reason(code_pb2.INVALID_ARGUMENT, {"field": "n", "problem": "is new"}),
    "HUB_UNREACHABLE": Reason(code_pb2.UNAVAILABLE, {"model": "a/b"}, retry=True),
    "HUB_RATE_LIMITED": Reason(code_pb2.UNAVAILABLE, {"model": "a/b"}, retry=True),
    "OFFLINE_NOT_CACHED": Reason(code_pb2.FAILED_PRECONDITION, {"model": "a/b"}),
    "MODEL_IN_USE": Reason(
        code_pb2.FAILED_PRECONDITION, {"model": "a/b", "active_requests": "3", "active_leases": "1"}
    ),
    "MODEL_NOT_LOADED": Reason(code_pb2.FAILED_PRECONDITION, {"model": "a/b"}),
    "MODEL_UNSUPPORTED": Reason(
        code_pb2.FAILED_PRECONDITION, {"model": "a/b", "problem": "no safetensors weights"}
    ),
    "SNAPSHOT_CORRUPT": Reason(
        code_pb2.DATA_LOSS,
        {"model": "a/b", "file": "model.safetensors", "expected": "aa", "found": "bb"},
    ),
    "SNAPSHOT_INCOMPLETE": Reason(
        code_pb2.DATA_LOSS, {"model": "a/b", "file": "model.safetensors"}
    ),
    "DISK_FULL": Reason(
        code_pb2.RESOURCE_EXHAUSTED, {"needed_bytes": "5000000000", "free_bytes": "17"}
    ),
    "DEVICE_MEMORY": Reason(
        code_pb2.RESOURCE_EXHAUSTED,
        {"model": "a/b", "needed_bytes": "9000", "free_bytes": "7", "holders": "c/d (2.1 GB)"},
    ),
    "QUEUE_FULL": Reason(code_pb2.RESOURCE_EXHAUSTED, {"model": "a/b", "limit": "256"}, retry=True),
    "SLOW_CONSUMER": Reason(code_pb2.RESOURCE_EXHAUSTED, {"limit": "1048576"}),
    "WORKER_DIED": Reason(code_pb2.UNAVAILABLE, {"model": "a/b"}, retry=True),
    "DRAINING": Reason(code_pb2.UNAVAILABLE, retry=True),
    "DEADLINE": Reason(code_pb2.DEADLINE_EXCEEDED),
    "INTERNAL": Reason(code_pb2.INTERNAL, {"incident": "0a1b2c3d"}),
    "HUB_UNAUTHORIZED": Reason(code_pb2.PERMISSION_DENIED, {"model": "a/b"}),
    "SNAPSHOT_NOT_FOUND": Reason(code_pb2.NOT_FOUND, {"model": "a/b"}),
    "SNAPSHOT_IN_USE": Reason(
        code_pb2.FAILED_PRECONDITION, {"model": "a/b", "holders": "m-1, download"}
    ),
    "CACHE_LIMIT": Reason(
        code_pb2.RESOURCE_EXHAUSTED,
        {"needed_bytes": "5000000000", "max_bytes": "6000000000", "held_bytes": "2000000000"},
    ),
    "CACHE_NOT_WRITABLE": Reason(
        code_pb2.FAILED_PRECONDITION, {"problem": "the file system is read-only"}
    ),
    "DOWNLOAD_CANCELLED": Reason(code_pb2.ABORTED, {"model": "a/b"}),
    "DOWNLOAD_INTERRUPTED": Reason(code_pb2.UNAVAILABLE, {"model": "a/b"}, retry=True),
    "LEASE_NOT_FOUND": Reason(code_pb2.NOT_FOUND, {"lease": "0a1b"}),
    "UNAUTHENTICATED": Reason(code_pb2.UNAUTHENTICATED, {"problem": "the token has expired"}),
    "FORBIDDEN": Reason(
        code_pb2.PERMISSION_DENIED, {"client": "ann", "role": "user", "action": "call it"}
    ),
    "CLIENT_LIMIT": Reason(
        code_pb2.RESOURCE_EXHAUSTED,
        {"client": "ann", "limit": "streams", "most": "4"},
        retry=True,
    ),
    "MODEL_NOT_ALLOWED": Reason(code_pb2.PERMISSION_DENIED, {"model": "a/b"}),
    "MODEL_TOO_LARGE": Reason(
        code_pb2.PERMISSION_DENIED, {"model": "a/b", "size_bytes": "9000", "max_bytes": "7"}
    ),
    "MODEL_UNLOADED": Reason(code_pb2.ABORTED, {"model": "a/b"}),
}


class FailureError(Exception):
    """Ends a call with the status of a reason."""

    def __init__(self, reason: str, **metadata: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.metadata = metadata or REASONS[reason].metadata

    @property
    def message(self) -> str:
        fields = ", ".join(f"{name} {value}" for name, value in self.metadata.items())
        return f"{self.reason.lower().replace('_', ' ')}: {fields}"

    def status(self) -> status_pb2.Status:
        known = REASONS.get(self.reason)
        status = status_pb2.Status(
            code=known.code if known else code_pb2.ABORTED, message=self.message
        )
        details = [
            error_details_pb2.ErrorInfo(
                reason=self.reason,
                domain="loaderd",
                metadata={**self.metadata, "request_id": REQUEST_ID},
            ),
        ]
        if known is None or known.retry:
            delay = Duration()
            delay.FromMilliseconds(int(RETRY_AFTER_S * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class UnknownReasonError(FailureError):
    """As from a newer daemon."""

    def __init__(self) -> None:
        super().__init__("INVENTED_LATER", colour="blue")
