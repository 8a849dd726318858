"""The local hub: an HTTP server that the real `huggingface_hub` downloads from.

Set `HF_ENDPOINT` to its `url` before the library is imported. It speaks what a download
needs: a repository's revision, the listing of a commit, and the files with ranges.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import socketserver
import struct
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from tests.hub.exchange import HubRequest, Response
from tests.hub.faults import CloseConnectionError, Fault, ResetConnectionError
from tests.hub.repo import Access, Commit, HubFile, HubRepo

_API = re.compile(
    r"/api/models/(?P<id>[^/]+?(?:/[^/]+?)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class _Rule:
    """A fault and the requests that it meets."""

    fault: Fault
    path: str
    method: str
    left: int | None

    def meets(self, request: HubRequest) -> bool:
        if self.left == 0 or not fnmatchcase(request.method, self.method):
            return False
        return fnmatchcase(request.path, self.path)


class Hub:
    """A hub on a free port of 127.0.0.1, with repositories and faults. Thread-safe.

    Args:
        repos: What it has; `add` brings more.
        port: 0 takes a free one, and keeps it when the hub is stopped and started again.
        page_size: How many entries of a listing one answer holds.
    """

    def __init__(self, *repos: HubRepo, port: int = 0, page_size: int = 1000) -> None:
        self._repos = {repo.id: repo for repo in repos}
        self._port = port
        self._page_size = page_size
        self._rules: list[_Rule] = []
        self._requests: list[HubRequest] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The value for `HF_ENDPOINT`."""
        if not self._port:
            raise RuntimeError("the hub was never started")
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[HubRequest]:
        """All requests so far, in the order of their arrival."""
        with self._lock:
            return list(self._requests)

    def add(self, repo: HubRepo) -> None:
        """Adds a repository, or puts it in the place of one with the same id."""
        with self._lock:
            self._repos[repo.id] = repo

    def inject(
        self, fault: Fault, *, path: str = "*", method: str = "GET", times: int | None = None
    ) -> None:
        """Lets requests meet a fault.

        Args:
            fault: One of `tests.hub.faults`.
            path: Glob over the path as sent (quoted), such as `/api/*` or `*/model.safetensors`.
            method: Glob over the method; GET by default because a HEAD has no body to spoil.
            times: How many requests meet it; None has no limit.
        """
        with self._lock:
            self._rules.append(_Rule(fault, path, method, times))

    def heal(self) -> None:
        """Takes all faults away; answers that are under way keep theirs."""
        with self._lock:
            self._rules.clear()

    def start(self) -> None:
        """Serves until `stop`."""
        self._server = _Server(self._port, self)
        self._port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="hub", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Goes away as a crashed hub does: open connections are cut."""
        if self._server and self._thread:
            self._server.cut()
            self._thread.join()
            self._server = self._thread = None

    def answer(self, request: HubRequest, stopped: threading.Event) -> Response:
        """Records the request and answers it, with the faults that it meets."""
        with self._lock:
            self._requests.append(request)
            rules = [rule for rule in self._rules if rule.meets(request)]
            for rule in rules:
                rule.left = None if rule.left is None else rule.left - 1
        response = self._route(request)
        for rule in rules:
            response = rule.fault(response, stopped)
        return response

    def _route(self, request: HubRequest) -> Response:
        if match := _API.fullmatch(request.path):
            name, what, quoted = match["id"], match["what"], match["revision"]
        elif match := _RESOLVE.fullmatch(request.path):
            name, what, quoted = match["id"], "file", match["revision"]
        else:
            return Response.error(HTTPStatus.NOT_FOUND, "NotFound", "no such page")
        with self._lock:
            repo = self._repos.get(name)
        if repo is None:
            return Response.error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        admitted = repo.admits(request.token)
        if repo.access is Access.PRIVATE and not admitted:
            return Response.error(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        revision = unquote(quoted or "main")
        commit = repo.find(revision)
        if commit is None:
            return Response.error(
                HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}"
            )
        if what == "tree":
            return self._tree(request, commit)
        if what != "file":
            return _info(repo, commit)
        if not admitted:
            return Response.error(
                HTTPStatus.FORBIDDEN, "GatedRepo", f"Access to model {repo.id} is restricted"
            )
        file = commit.files.get(unquote(match["path"]))
        if file is None:
            return Response.error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        return _file(request, commit, file)

    def _tree(self, request: HubRequest, commit: Commit) -> Response:
        if request.query.get("recursive") != "true":
            return Response.error(HTTPStatus.BAD_REQUEST, "BadRequest", "list recursively")
        entries = _entries(commit)
        start = int(request.query.get("cursor", "0"))
        stop = start + self._page_size
        headers = {}
        if stop < len(entries):
            query = urlencode({**request.query, "cursor": stop})
            headers["Link"] = f'<{self.url}{request.path}?{query}>; rel="next"'
        return Response.json(entries[start:stop], headers)


def _info(repo: HubRepo, commit: Commit) -> Response:
    return Response.json(
        {
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit.sha,
            "private": repo.access is Access.PRIVATE,
            "gated": "auto" if repo.access is Access.GATED else False,
            "disabled": False,
            "tags": ["transformers", "safetensors"],
            "siblings": [{"rfilename": path} for path in commit.files],
        }
    )


def _entries(commit: Commit) -> list[dict[str, Any]]:
    folders = {parent.as_posix() for path in commit.files for parent in PurePosixPath(path).parents}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "oid": commit.sha, "size": 0, "path": folder}
        for folder in sorted(folders - {"."})
    ]
    for file in commit.files.values():
        entry = {"type": "file", "oid": file.oid, "size": file.size, "path": file.path}
        if file.sha256:
            lfs = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            entry["lfs"] = lfs
        entries.append(entry)
    return entries


def _file(request: HubRequest, commit: Commit, file: HubFile) -> Response:
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{file.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if file.sha256:
        headers["X-Linked-Etag"] = f'"{file.etag}"'
        headers["X-Linked-Size"] = str(file.size)
    status, start, stop = HTTPStatus.OK, 0, file.size
    if request.range is not None:
        asked = _RANGE.fullmatch(request.range)
        if not asked or int(asked[1]) >= file.size:
            headers |= {"Content-Range": f"bytes */{file.size}", "Content-Length": "0"}
            return Response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
        status, start = HTTPStatus.PARTIAL_CONTENT, int(asked[1])
        stop = min(int(asked[2]) + 1, file.size) if asked[2] else file.size
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    headers["Content-Length"] = str(stop - start)
    return Response(status, headers, file.read(start, stop))


class _Server(ThreadingHTTPServer):
    """Knows its open connections, so that it can cut them."""

    daemon_threads = True
    # Many clients may come at once; the default of 5 lets the others wait for a second.
    request_queue_size = 128

    def __init__(self, port: int, hub: Hub) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def cut(self) -> None:
        """Stops accepting and closes every connection, whatever it is doing."""
        self.stopped.set()
        self.shutdown()
        self.server_close()
        with self._open_lock:
            for connection in self._open:
                # It may be closed already, from the other side or by a reset.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        # HTTPServer looks the host's name up, which takes long where there is no name server.
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the hub, sends its answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        # Clients may break off at any time, and so may the hub when it is stopped.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Says nothing: the hub records its requests instead."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = HubRequest(
            method=self.command,
            path=url.path,
            query=dict(parse_qsl(url.query)),
            range=self.headers.get("Range"),
            token=self.headers.get("Authorization", "").removeprefix("Bearer ") or None,
        )
        try:
            self._send(request, self.server.hub.answer(request, self.server.stopped))
        except CloseConnectionError:
            self.close_connection = True
        except ResetConnectionError:
            self._reset()

    def _send(self, request: HubRequest, response: Response) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        request.status = response.status
        if self.command == "HEAD":
            return
        for chunk in response.body:
            self.wfile.write(chunk)
            request.sent_bytes += len(chunk)

    def _reset(self) -> None:
        # With no time to linger, closing sends RST. It must be the first thing that closes:
        # the server would send FIN before.
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
