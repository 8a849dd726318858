"""The application: all routes, and what every request passes."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from loaderd.server.errors import LoaderdError
from loaderd.server.http.caller import caller
from loaderd.server.http.errors import on_failure, on_refusal
from loaderd.server.http.guard import Counted, Named, OwnHost, WithRoom
from loaderd.server.http.metrics.metrics import Metrics
from loaderd.server.http.openai.api import OpenAiApi
from loaderd.server.http.status_page import status_routes
from loaderd.server.http.tracing import Traced
from loaderd.server.rpc.local import LocalCalls
from loaderd.server.tracing.spans import Tracer
from loaderd.v1.system_pb2 import GetServerInfoRequest

_GET_SERVER_INFO = "loaderd.v1.SystemService/GetServerInfo"


def build_app(
    calls: LocalCalls,
    metrics: Metrics,
    is_draining: Callable[[], bool],
    is_own_host: Callable[[str], bool],
    has_room: Callable[[], bool],
    *,
    tracer: Tracer | None = None,
) -> ASGIApp:
    """The application.

    Args:
        calls: Reaches the daemon's services.
        metrics: What /metrics tells.
        is_draining: Whether the daemon shuts down.
        is_own_host: Tells the hosts that requests may name.
        has_room: Whether there is room for the connections that are open.
        tracer: Gets a span of each request to the API; None: nobody asked.
    """

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        if is_draining():
            return PlainTextResponse("draining\n", 503)
        return PlainTextResponse("ok\n")

    async def tell_metrics(request: Request) -> Response:
        # Whoever may ask the daemon how it is may have them.
        await calls.unary(_GET_SERVER_INFO, GetServerInfoRequest(), caller(request))
        content, content_type = await metrics.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    routes = [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", tell_metrics),
        *status_routes(calls),
    ]
    known = {route.path for route in routes}

    def route_of(path: str) -> str:
        return _route(path, known)

    traced = [] if tracer is None else [Middleware(Traced, tracer=tracer, route_of=route_of)]
    app = Starlette(
        routes=[*routes, OpenAiApi(calls).routes()],
        middleware=[
            Middleware(Counted, answered=metrics.answered, route_of=route_of),
            Middleware(Named),
            Middleware(WithRoom, has_room=has_room),
            *traced,
            Middleware(OwnHost, is_own=is_own_host),
        ],
        exception_handlers={
            LoaderdError: on_failure,
            HTTPException: on_refusal,
            Exception: on_failure,
        },
    )
    app.router.redirect_slashes = False  # a path is as it is documented, or is not there
    return app


_API_PATHS = {"/v1/models", "/v1/chat/completions", "/v1/completions"}


def _route(path: str, known: set[str]) -> str:
    """The route of a path: one of few, whatever clients ask for."""
    if path in known or path in _API_PATHS:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
