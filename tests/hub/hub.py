"""The local hub: repositories, faults, and a record of what was asked.

Set `HF_ENDPOINT` to its `url` before `huggingface_hub` is imported.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType

from tests.hub.exchange import HubRequest, Response
from tests.hub.faults import Fault
from tests.hub.repo import HubRepo
from tests.hub.routes import route
from tests.hub.server import Server


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
        self._server: Server | None = None
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
        self._server = Server(self._port, self._answer)
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

    def _answer(self, request: HubRequest, stopped: threading.Event) -> Response:
        """Records the request and answers it, with the faults that it meets."""
        with self._lock:
            self._requests.append(request)
            repos = dict(self._repos)
            rules = [rule for rule in self._rules if rule.meets(request)]
            for rule in rules:
                rule.left = None if rule.left is None else rule.left - 1
        response = route(request, repos, url=self.url, page_size=self._page_size)
        for rule in rules:
            response = rule.fault(response, stopped)
        return response
