"""One call: its id, and what the logs say of it."""

from __future__ import annotations

import logging
import time
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import code_pb2

from loaderd.server.access.roles import Role, may_call
from loaderd.server.errors import InvalidArgumentError, LoaderdError
from loaderd.server.logs.audit import AuditLog
from loaderd.server.logs.call import bind, current_request_id, request_id_problem
from loaderd.server.rpc.access import caller_if_known
from loaderd.server.rpc.status import status_of
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import Span, enter
from loaderd.v1.generation_pb2 import GenerateRequest, StreamGenerateRequest

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_HEADER = "x-request-id"
"""Metadata in which callers name a call, and in which its answer ends with the name."""

_LOAD = "/loaderd.v1.ModelService/LoadModel"
_LONGEST_REQUEST = 1 << 16
_FAILURES = {
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
}
"""Codes that are a server's failure, rather than its answer, by OpenTelemetry's conventions."""


class Call:
    """One call, from when its request is there until it has ended.

    Args:
        method: The method's path.
        request: The message, or the stream of them.
        context: The call.
        audit: Gets a line when the call is of an administrator's kind; None: nobody asked.
        span: Tells of it; None: nobody asked. It ends when the logs are told of the call's end.

    Attributes:
        method: The method's path.
        request: What was given.
        context: What was given.
        peer: Where it comes from.
        request_id: What names it: what the caller gave, else one of the daemon's.
    """

    def __init__(
        self,
        method: str,
        request: object,
        context: Context,
        audit: AuditLog | None,
        span: Span | None = None,
    ) -> None:
        self.method = method
        self.request = request
        self.context = context
        # Asked for now: of a call that has ended, gRPC's core crashes when it is asked.
        self.peer = str(context.peer())
        self._metadata: Any = context.invocation_metadata() or ()
        self._audit = audit if is_audited(method) else None
        self._span = span
        if span is not None:
            enter(span)
        self._started = time.monotonic()
        self.request_id = current_request_id()
        bind(request_id=self.request_id, method=method.removeprefix("/").replace("/", "."))

    def identify(self) -> None:
        """Takes the id that the caller gave.

        Raises:
            InvalidArgumentError: It is no id, or there are two.
        """
        self.request_id = self._given_id() or self.request_id
        bind(request_id=self.request_id)

    def tell(self, code: str, reason: str = "") -> None:
        """Tells the logs how it has ended.

        Args:
            code: Name of the gRPC code.
            reason: The error's reason, if it has one.
        """
        caller = caller_if_known()
        outcome: dict[str, object] = {
            "peer": self.peer,
            "code": code,
            "duration": round(time.monotonic() - self._started, 4),
        }
        if reason:
            outcome["reason"] = reason
        model = _model_of(self.request)
        if self._span is not None:
            self._tell_span(self._span, code, reason, model)
        # Who only looks may ask every second, and changes nothing.
        quiet = code == "OK" and may_call(Role.MONITOR, self.method)
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s",
            self.method,
            reason or code,
            extra={**outcome, "model": model},
        )
        if self._audit is not None:
            known = caller is not None and caller.role is not Role.ANONYMOUS
            self._audit.write(
                {
                    "action": self.method.rpartition("/")[2],
                    "client": caller.name if caller else "",
                    "role": str(caller.role) if caller else "",
                    "request": _kept(self.request) if known else {},  # strangers fill no disk
                    "request_id": self.request_id,
                    **outcome,
                }
            )

    def _tell_span(self, span: Span, code: str, reason: str, model: str) -> None:
        asks_for_text = isinstance(self.request, StreamGenerateRequest | GenerateRequest)
        told = {
            names.RPC_STATUS: code,
            names.REQUEST_ID: self.request_id,
            names.REASON: reason,
            names.REQUEST_MODEL if asks_for_text else names.MODEL: model,
        }
        span.set({name: value for name, value in told.items() if value})
        span.end(error=(reason or code) if code in _FAILURES else "")

    def _given_id(self) -> str | None:
        given = [("request_id", each) for each in _own_id(self.request)]
        for key, value in self._metadata:
            if key == REQUEST_ID_HEADER:
                given.append((REQUEST_ID_HEADER, value))
        for field, request_id in given:
            if problem := request_id_problem(request_id):
                raise InvalidArgumentError(field, problem)
        if len({request_id for _, request_id in given}) > 1:
            problem = "the call has another one already; give one, as request_id or as x-request-id"
            raise InvalidArgumentError(given[-1][0], problem)
        return given[0][1] if given else None


def is_audited(method: str) -> bool:
    """Whether a call goes to the audit log: what users may not call, and what loads a model."""
    return method == _LOAD or not may_call(Role.USER, method)


def code_of(error: LoaderdError) -> str:
    """The name of the gRPC code with which an error ends a call."""
    return code_name(status_of(error, "").code)


def code_name(number: int) -> str:
    """The name of a gRPC code."""
    return str(code_pb2.Code.Name(code_pb2.Code.ValueType(number)))


def _model_of(request: object) -> str:
    """The model that a request names; empty if it names none."""
    model = getattr(request, "model", "")
    return model if isinstance(model, str) else ""


def _own_id(request: object) -> list[str]:
    """The id in the request itself; empty if it has none."""
    if not isinstance(request, StreamGenerateRequest | GenerateRequest):
        return []
    return [request.request_id] if request.HasField("request_id") else []


def _kept(request: object) -> object:
    """A request as the audit log keeps it."""
    if not isinstance(request, Message):
        return {}
    if request.ByteSize() > _LONGEST_REQUEST:
        return f"of {request.ByteSize()} bytes, too long to keep"
    return MessageToDict(request, preserving_proto_field_name=True)
