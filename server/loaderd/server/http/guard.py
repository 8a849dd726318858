"""What every request over HTTP passes before it reaches its handler."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.http.errors import failure, refusal
from loaderd.server.logs.call import bind, new_request_id, request_id_problem
from loaderd.server.rpc.call import REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""As much as a message of gRPC may have."""
MAX_REQUESTS = 512
"""Requests to the API that may be open at once."""
_BODY_S = 30.0
_CLIENT_LEFT = 499
_DEFECT = 500


class Counted:
    """Tells how each request ended, to the log and to metrics.

    Args:
        app: Answers.
        answered: Called with the route and the status.
        route_of: The route of a path; one of few.
    """

    def __init__(
        self,
        app: ASGIApp,
        answered: Callable[[str, int], None],
        route_of: Callable[[str], str],
    ) -> None:
        self._app = app
        self._answered = answered
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        status, started = _CLIENT_LEFT, time.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = _DEFECT if status == _CLIENT_LEFT else status
            raise
        finally:
            route = self._route_of(scope["path"])
            self._answered(route, status)
            elapsed_ms = (time.monotonic() - started) * 1000
            logger.debug("%s %s %d %.1f ms", scope["method"], route, status, elapsed_ms)


class Named:
    """Gives each request a name: that of its header, or one of the daemon's. Answers tell it.

    Args:
        app: Answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        given = Headers(scope=scope).get(REQUEST_ID_HEADER)
        problem = None if given is None else request_id_problem(given)
        request_id = new_request_id() if given is None or problem else given
        bind(request_id=request_id)

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        if problem is None:
            await self._app(scope, receive, name)
        else:
            error = InvalidArgumentError(REQUEST_ID_HEADER, problem)
            await failure(error)(scope, receive, name)


class WithRoom:
    """Refuses requests while too many connections are open.

    Args:
        app: Answers.
        has_room: Whether there is room for those that are.
    """

    def __init__(self, app: ASGIApp, has_room: Callable[[], bool]) -> None:
        self._app = app
        self._has_room = has_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if self._has_room():
            await self._app(scope, receive, send)
        else:
            text = "too many connections are open; try again later"
            headers = {"Retry-After": "1", "Connection": "close"}
            await refusal(HTTPException(503, text, headers))(scope, receive, send)


class OwnHost:
    """Refuses requests to other hosts than this box.

    A page that a browser shows may have its host's name mean 127.0.0.1, and would then be let
    in as if it came from the daemon.

    Args:
        app: Answers.
        is_own: Whether a host is this box as it calls itself.
    """

    def __init__(self, app: ASGIApp, is_own: Callable[[str], bool]) -> None:
        self._app = app
        self._is_own = is_own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        named = Headers(scope=scope).get("host", "")
        if self._is_own(_host_of(named)):
            await self._app(scope, receive, send)
        else:
            text = "the Host of a request must be localhost or a loopback address"
            await refusal(HTTPException(421, text))(scope, receive, send)


class Bounded:
    """Refuses requests while too many are open.

    Args:
        app: Answers.
        most: How many.
    """

    def __init__(self, app: ASGIApp, most: int = MAX_REQUESTS) -> None:
        self._app = app
        self._most = most
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if self._open >= self._most:
            text = f"{self._most} requests are open already; try again later"
            raise HTTPException(503, text, {"Retry-After": "1"})
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


class WhileConnected:
    """Takes the whole body, then cancels the handler when the client leaves.

    Args:
        app: Answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        try:
            async with asyncio.timeout(_BODY_S):
                body = await _body(receive)
        except TimeoutError:
            text = f"the request's body did not come within {_BODY_S:.0f} seconds"
            raise HTTPException(408, text) from None
        if body is None:
            return  # the client left
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await asyncio.Future()  # who leaves is noticed here, not in the handler

        work = asyncio.ensure_future(self._app(scope, replay, send))
        leaving = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            left = not work.done()
            if left:
                work.cancel()
                await asyncio.wait({work})
        if not (left and work.cancelled()):
            work.result()


def _host_of(header: str) -> str:
    """The host that a Host header names; empty if it names none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None if the client left.

    Raises:
        HTTPException: It is too large.
    """
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request's body may have {MAX_BODY_BYTES} bytes")
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
