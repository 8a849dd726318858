"""The status page: what the daemon does now, for people."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loaderd.server.http.caller import caller
from loaderd.server.rpc.local import LocalCalls
from loaderd.v1.cache_pb2 import ListSnapshotsRequest
from loaderd.v1.model_pb2 import ListModelsRequest
from loaderd.v1.system_pb2 import GetServerInfoRequest, ListDevicesRequest

Endpoint = Callable[[Request], Awaitable[Response]]

_PAGES = {
    "/": ("index.html", "text/html"),
    "/status.js": ("status.js", "text/javascript"),
    "/status.css": ("status.css", "text/css"),
}
_VIEWS: dict[str, tuple[str, Message]] = {
    "/status/server": ("loaderd.v1.SystemService/GetServerInfo", GetServerInfoRequest()),
    "/status/models": ("loaderd.v1.ModelService/ListModels", ListModelsRequest()),
    "/status/devices": ("loaderd.v1.SystemService/ListDevices", ListDevicesRequest()),
    "/status/cache": ("loaderd.v1.CacheService/ListSnapshots", ListSnapshotsRequest()),
}
"""What the page asks for, again and again: answers of the daemon's services, as JSON."""

# Its own files and nothing else, inside no other page.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def status_routes(calls: LocalCalls) -> list[Route]:
    """The page, and what it asks for.

    Args:
        calls: Reaches the daemon's services.
    """
    return [
        *(Route(path, _page(*page)) for path, page in _PAGES.items()),
        *(Route(path, _view(calls, *view)) for path, view in _VIEWS.items()),
    ]


def _page(file: str, media_type: str) -> Endpoint:
    content = resources.files("loaderd.server.http").joinpath("page", file).read_bytes()

    async def page(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return page


def _view(calls: LocalCalls, method: str, asked: Message) -> Endpoint:
    async def view(request: Request) -> Response:
        told = await calls.unary(method, asked, caller(request))
        return JSONResponse(MessageToDict(told, preserving_proto_field_name=True), headers=_HEADERS)

    return view
