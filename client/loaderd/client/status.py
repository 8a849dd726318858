"""From a failed RPC to a typed error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from loaderd.client import errors

_DOMAIN = "loaderd"
_DETAILS_KEY = "grpc-status-details-bin"
_TLS_ADVICE = (
    "; if there is one, see whether it speaks TLS, whether the CA that was given signed its "
    "certificate for this name, and whether it wants a certificate of this client"
)


@dataclass(frozen=True)
class CallContext:
    """What the seam knows of a call, for the texts of its errors.

    Attributes:
        address: The daemon's gRPC target.
        timeout: Seconds until the call's deadline; None: it has none.
        request_id: What the daemon's log calls the call.
        tls: Whether the client speaks TLS.
        metadata: What the call carries.
    """

    address: str
    timeout: float | None
    request_id: str
    tls: bool = False
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass
class _Details:
    """What the details of a `google.rpc.Status` say."""

    reason: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None
    request_id: str | None = None


def error_from_rpc(
    failure: grpc.RpcError, call: CallContext, *, answered: bool = False
) -> errors.LoaderdError:
    """The typed error of a failed call.

    With loaderd's ErrorInfo it is the class of the reason, or `LoaderdError` for an unknown one.
    Without it the failure comes from this side, from the network, or from another server.

    Args:
        failure: What gRPC raised.
        call: The call.
        answered: Whether the daemon had sent a part of its answer before.
    """
    details = _read_details(failure)
    message = failure.details() or failure.code().value[1]
    if details.reason is None:
        kind, message = _own_error(failure.code(), message, call, answered=answered)
    else:
        kind = errors.BY_REASON.get(details.reason, errors.LoaderdError)
    return kind(
        message,
        code=failure.code(),
        reason=details.reason,
        metadata=details.metadata,
        retry_after=details.retry_after,
        request_id=details.request_id or call.request_id,
    )


def _own_error(
    code: grpc.StatusCode, message: str, call: CallContext, *, answered: bool
) -> tuple[type[errors.LoaderdError], str]:
    """The class and text of a failure that no daemon explained."""
    match code:
        case grpc.StatusCode.UNAVAILABLE if answered:
            return errors.DaemonUnreachableError, (
                f"the connection to the loaderd daemon at {call.address} was lost; "
                "try again, or see whether it still runs"
            )
        case grpc.StatusCode.UNAVAILABLE:
            return errors.DaemonUnreachableError, (
                f"no loaderd daemon answers at {call.address}; start one with `loaderd`, or give "
                f"its address, for example in LOADERD_ADDRESS{_TLS_ADVICE if call.tls else ''}"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineError, (
                f"the daemon at {call.address} did not finish within {call.timeout:g} s; "
                "give a longer timeout"
                if call.timeout is not None
                else message
            )
        case grpc.StatusCode.CANCELLED:
            return errors.CallCancelledError, "the call was cancelled"
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.UnexpectedAnswerError, (
                f"the server at {call.address} does not offer this call; it is an older loaderd, "
                f"or another server ({message})"
            )
        case _:
            return errors.LoaderdError, message


def _read_details(failure: grpc.RpcError) -> _Details:
    """The details in the trailing metadata; empty where there are none that can be read."""
    found = _Details()
    for packed in _status(failure).details:
        match packed.TypeName():
            case "google.rpc.ErrorInfo":
                info = error_details_pb2.ErrorInfo.FromString(packed.value)
                if info.domain == _DOMAIN:
                    found.reason, found.metadata = info.reason, dict(info.metadata)
                    found.request_id = found.metadata.pop("request_id", None)
            case "google.rpc.RetryInfo":
                retry = error_details_pb2.RetryInfo.FromString(packed.value)
                found.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return found


def _status(failure: grpc.RpcError) -> status_pb2.Status:
    # grpc's type stubs hide that its metadata are pairs.
    metadata = cast("Iterable[tuple[str, bytes]]", failure.trailing_metadata() or ())
    packed = dict(metadata).get(_DETAILS_KEY, b"")
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:
        return status_pb2.Status()  # code and text of the failure still stand
