"""A request to the local hub and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus


@dataclass
class HubRequest:
    """What was asked, and what came of it; the last two change while it is answered.

    Attributes:
        path: As sent, so quoted, and without the query.
        range: The `Range` header.
        token: The bearer token.
        status: The status that was sent; None before.
        sent_bytes: How much of the body was sent.
    """

    method: str
    path: str
    query: Mapping[str, str]
    range: str | None = None
    token: str | None = None
    status: int | None = None
    sent_bytes: int = 0


@dataclass(frozen=True)
class Response:
    """An answer whose body is produced while it is sent.

    Attributes:
        headers: With `Content-Length`, which a fault's body need not keep.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()

    @staticmethod
    def text(
        status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        own = {"Content-Type": content_type, "Content-Length": str(len(body))}
        return Response(status, {**own, **(headers or {})}, [body])

    @staticmethod
    def json(content: object, headers: Mapping[str, str] | None = None) -> Response:
        body = json.dumps(content).encode()
        return Response.text(HTTPStatus.OK, body, "application/json", headers)

    @staticmethod
    def error(status: int, code: str, message: str) -> Response:
        """An error as the hub says it; `code` is what the client library tells apart."""
        body = json.dumps({"error": message}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        return Response.text(status, body, "application/json", headers)
