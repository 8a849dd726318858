"""Failures as answers of HTTP, in the shape that OpenAI's API has for them."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from google.rpc import code_pb2, error_details_pb2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loaderd.server.errors import InternalError, LoaderdError
from loaderd.server.logs.call import current_request_id
from loaderd.server.rpc.call import REQUEST_ID_HEADER
from loaderd.server.rpc.status import status_of

logger = logging.getLogger(__name__)

_BY_CODE = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.FAILED_PRECONDITION: 409,
    code_pb2.ABORTED: 409,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.INTERNAL: 500,
    code_pb2.DATA_LOSS: 500,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
"""The status of each code of gRPC that a reason has."""

_BY_REASON = {
    "MODEL_NOT_LOADED": 404,
    "OFFLINE_NOT_CACHED": 404,
    "MODEL_UNSUPPORTED": 422,
    "HUB_UNAUTHORIZED": 502,  # it is the daemon's token that the hub refuses
    "DEVICE_MEMORY": 503,
    "DISK_FULL": 507,
    "CACHE_LIMIT": 507,
}
"""Where HTTP can say it better."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


REFUSALS = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    415: "not_json",
    421: "wrong_host",
    503: "too_many_requests",
}
"""The code of each status that the framework or a guard refuses a request with."""


def status_and_headers(error: LoaderdError) -> tuple[int, dict[str, str]]:
    """The status of an error, and the headers that say whether to try again."""
    described = status_of(error, current_request_id())
    status = _BY_REASON.get(error.reason, _BY_CODE[described.code])
    # OpenAI's clients go by this; without it they would repeat what cannot get better.
    headers = {"x-should-retry": "false"}
    retry = error_details_pb2.RetryInfo()
    for detail in described.details:
        if detail.Unpack(retry):
            headers = {"x-should-retry": "true", "retry-after": str(retry.retry_delay.seconds)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return status, headers


def body_of(error: LoaderdError) -> dict[str, Any]:
    """The body of an error's answer, and of an event that ends a stream with it."""
    status, _ = status_and_headers(error)
    return _body(status, str(error), error.reason.lower(), error.metadata.get("field"))


def failure(error: LoaderdError) -> Response:
    """The answer to a request that failed."""
    status, headers = status_and_headers(error)
    return JSONResponse(body_of(error), status, headers)


def refusal(error: HTTPException) -> Response:
    """The answer to a request that is wrong as one of HTTP."""
    body = _body(error.status_code, error.detail, REFUSALS[error.status_code], None)
    headers: Mapping[str, str] = error.headers or {}
    return JSONResponse(body, error.status_code, headers)


def defect(error: Exception) -> InternalError:
    """What a client is told of a defect; the log gets the cause."""
    told = InternalError(incident=secrets.token_hex(4))
    logger.error("incident %s", told.incident, exc_info=error)
    return told


async def on_failure(_: Request, error: Exception) -> Response:
    """Answers for a handler that raised a domain error."""
    response = failure(error if isinstance(error, LoaderdError) else defect(error))
    response.headers[REQUEST_ID_HEADER] = current_request_id()  # a defect passes no middleware
    return response


async def on_refusal(_: Request, error: Exception) -> Response:
    """Answers for the framework, or a guard, that refused a request."""
    return refusal(error) if isinstance(error, HTTPException) else failure(defect(error))


def _body(status: int, message: str, code: str, param: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
