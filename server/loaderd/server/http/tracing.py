"""The span of a request over HTTP."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loaderd.server.logs.call import current_request_id
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import CANCELLED, Tracer, within


class Traced:
    """Tells of requests to the API; probes, metrics and the status page say little and often.

    Args:
        app: Answers.
        tracer: Gets the spans.
        route_of: The route of a path; one of few.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, route_of: Callable[[str], str]) -> None:
        self._app = app
        self._tracer = tracer
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        route, method = self._route_of(scope["path"]), scope["method"]
        span = self._tracer.serve(f"{method} {route}", Headers(scope=scope).items())
        told = {
            names.HTTP_METHOD: method,
            names.HTTP_ROUTE: route,
            names.URL_SCHEME: scope["scheme"],
            names.REQUEST_ID: current_request_id(),
        }
        span.set(told)
        error = CANCELLED  # unless an answer begins

        async def note(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set({names.HTTP_STATUS: status})
                error = str(status) if status >= 500 else ""
            await send(message)

        try:
            with within(span):
                await self._app(scope, receive, note)
        except Exception:
            error = "INTERNAL"
            raise
        finally:
            span.end(error=error)
