"""Checks on everything that is asked and answered over the hub library's HTTP session.

The library trusts the hub: it waits as long as it is told to, asks some things without a time-out
and reads answers without an end. Hooks on its HTTP session check each request and
response before anybody sees it. They act only inside `guard`, so that other code of the
process may use the library as ever.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING

from loaderd.server.errors import HubUnreachableError, SnapshotCorruptError
from loaderd.server.store.digests import is_digest
from loaderd.server.store.plan import PlannedFile

if TYPE_CHECKING:
    import httpx2

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
MAX_ANSWER_BYTES = 64 << 20

_DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_LONGEST_SHOWN = 64

_log = logging.getLogger(__name__)
_install_lock = threading.Lock()


class HubBusyError(Exception):
    """The hub answered 408, 429 or 5xx: it may well answer later.

    Attributes:
        rate_limited: Whether it was 429.
        retry_after: The seconds that it asked to wait, if it did.
    """

    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__(f"the hub answered {status}")
        self.rate_limited = status == HTTPStatus.TOO_MANY_REQUESTS
        self.retry_after = retry_after


@dataclass(frozen=True)
class Exchange:
    """What the requests that a thread makes now are about.

    Attributes:
        endpoint: The hub; only its origin ever gets the token.
        model: The model, for errors.
        commit: The commit whose files are fetched.
        file: The file that is being fetched.
        on_response: Called whenever the hub has answered; what it raises ends the request.
    """

    endpoint: str
    model: str
    commit: str | None = None
    file: PlannedFile | None = None
    on_response: Callable[[], None] = lambda: None


_exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def guard(exchange: Exchange) -> Iterator[None]:
    """Checks what this thread's calls of the hub library ask and are answered."""
    _install()
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def is_loopback(host: str) -> bool:
    """Whether a host, as a URL names it, is this box itself."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _install() -> None:
    from huggingface_hub.utils import _http

    with _install_lock:
        if _check_response in _http.get_session().event_hooks["response"]:
            return
        # Whoever set a factory, say for a proxy, keeps it. The library has no public getter.
        factory = _http._GLOBAL_CLIENT_FACTORY

        def guarded() -> httpx2.Client:
            client = factory()
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks["request"], _check_request],
                "response": [*hooks["response"], _check_response],
            }
            return client

        _http.set_client_factory(guarded)


def _check_request(request: httpx2.Request) -> None:
    import httpx2

    exchange = _exchange.get()
    if exchange is None:
        return
    if request.url.scheme != "https" and not is_loopback(request.url.host):
        _log.warning("the hub leads to %s without encryption; refused", request.url.host)
        raise HubUnreachableError(exchange.model)
    endpoint = httpx2.URL(exchange.endpoint)
    if _origin(request.url) != _origin(endpoint):
        request.headers.pop("authorization", None)
    request.headers["accept-encoding"] = "identity"
    timeout = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        "connect": timeout.get("connect") or CONNECT_TIMEOUT,
        "read": timeout.get("read") or READ_TIMEOUT,
        "write": timeout.get("write") or READ_TIMEOUT,
        "pool": timeout.get("pool"),
    }


def _check_response(response: httpx2.Response) -> None:
    import httpx2

    exchange = _exchange.get()
    if exchange is None:
        return
    exchange.on_response()
    if _is_busy(response.status_code):
        raise HubBusyError(response.status_code, _retry_after(response))
    elsewhere = _origin(response.request.url) != _origin(httpx2.URL(exchange.endpoint))
    if elsewhere and response.status_code in _DENIED:
        _log.warning("%s denies what the hub had promised", response.request.url.host)
        raise HubUnreachableError(exchange.model)
    if exchange.file is not None:
        if not elsewhere:
            _check_metadata(response, exchange, exchange.file)
        if response.is_success:
            _check_length(response, exchange, exchange.file)
            return  # who fetches a file looks at what comes
    if not _is_plain(response):
        _log.warning("the hub packs its answer, although it was asked not to")
        raise HubUnreachableError(exchange.model)
    response.stream = _bounded(response.stream, exchange)


def _is_busy(status: int) -> bool:
    return (
        status in {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
        or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    )


def _check_metadata(response: httpx2.Response, exchange: Exchange, file: PlannedFile) -> None:
    """What the hub says of a file must not contradict its listing; it need say nothing."""
    if _leads_on(response) or not (response.is_success or response.has_redirect_location):
        return  # it speaks of something else
    commit = response.headers.get("x-repo-commit")
    if commit is not None and commit != exchange.commit:
        raise SnapshotCorruptError(
            exchange.model, file.path, f"a file of commit {exchange.commit}", _shown(commit)
        )
    linked, own = response.headers.get("x-linked-etag"), response.headers.get("etag")
    digest = (linked or own or "").removeprefix("W/").strip('"')
    # Another kind of tag says nothing of the content.
    if is_digest(digest) and len(digest) == len(file.digest) and digest != file.digest:
        raise SnapshotCorruptError(exchange.model, file.path, file.digest, digest)
    _check_size(response.headers.get("x-linked-size"), exchange, file)


def _leads_on(response: httpx2.Response) -> bool:
    """Whether it is a redirect within the server, which says nothing of the file."""
    if not response.has_redirect_location:
        return False
    here = response.request.url
    return _origin(here.join(response.headers["location"])) == _origin(here)


def _check_length(response: httpx2.Response, exchange: Exchange, file: PlannedFile) -> None:
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        # `bytes 10-19/20` for a request of `bytes=10-`
        part, _, size = response.headers.get("content-range", "").rpartition("/")
        asked = response.request.headers.get("range", "").replace("=", " ")
        if part and not part.startswith(asked):
            raise SnapshotCorruptError(exchange.model, file.path, asked, "another part of it")
        _check_size(size or None, exchange, file)
    elif _is_plain(response):
        _check_size(response.headers.get("content-length"), exchange, file)


def _is_plain(response: httpx2.Response) -> bool:
    """Whether the body is as long as what is made of it; a packed one can be a thousandth."""
    return response.headers.get("content-encoding", "identity") == "identity"


def _check_size(size: str | None, exchange: Exchange, file: PlannedFile) -> None:
    if size is not None and size not in {"*", str(file.size_bytes)}:
        raise SnapshotCorruptError(
            exchange.model, file.path, f"{file.size_bytes} bytes", f"{_shown(size)} bytes"
        )


def _shown(text: str) -> str:
    """What a hub said, fit for an error that people see."""
    return text if text.isalnum() and len(text) <= _LONGEST_SHOWN else "something else"


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _retry_after(response: httpx2.Response) -> float | None:
    asked = response.headers.get("retry-after", "").strip()
    return float(asked) if asked.isascii() and asked.isdecimal() else None


def _bounded(inner: object, exchange: Exchange) -> httpx2.SyncByteStream:
    """A body that ends: the library takes all of it into memory."""
    import httpx2

    if not isinstance(inner, httpx2.SyncByteStream):
        raise TypeError("the library's session is not synchronous")
    stream = inner

    class Body(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            received = 0
            for chunk in stream:
                received += len(chunk)
                if received > MAX_ANSWER_BYTES:
                    _log.warning("the hub's answer is longer than %d bytes", MAX_ANSWER_BYTES)
                    raise HubUnreachableError(exchange.model)
                yield chunk

        def close(self) -> None:
            stream.close()

    return Body()
