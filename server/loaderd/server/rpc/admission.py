"""What every call passes before its servicer, whatever it comes by."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.logs.audit import AuditLog
from loaderd.server.rpc import bounds
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.call import Call
from loaderd.server.rpc.clients import Clients
from loaderd.server.tracing.spans import Span

Context = grpc.aio.ServicerContext[Any, Any]


class Malformed:
    """Stands for a request whose bytes are no message of its type."""


class Admission:
    """The way in: a call is counted, named, admitted, and its request is within bounds.

    Args:
        access: Says who calls and whether they may.
        clients: Counts who calls.
        audit: Told what administrators do; None: nobody asked.
    """

    def __init__(self, access: Access, clients: Clients, audit: AuditLog | None = None) -> None:
        self._access = access
        self._clients = clients
        self._audit = audit

    def call(
        self, method: str, request: object, context: Context, span: Span | None = None
    ) -> Call:
        """A call that asks to be let in; it is to be told how it ends, also if it is not.

        Args:
            method: The method's path.
            request: The message, or the stream of them.
            context: The call.
            span: Tells of it; None: nobody asked.
        """
        return Call(method, request, context, self._audit, span)

    @contextmanager
    def admit(self, call: Call, *, streams: bool) -> Iterator[Any]:
        """Lets a call in, and counts it while it runs.

        Args:
            call: The call.
            streams: Whether it answers with a stream.

        Yields:
            Its request; of a stream of them, one that checks each as it comes.

        Raises:
            LoaderdError: It is not let in: its id, its credentials, its limits, or its request.
        """
        with self._clients.calling(call.peer):
            call.identify()
            with self._access.admit(call.method, call.context, streams=streams):
                if isinstance(call.request, AsyncIterable):
                    yield _checked_all(call.request)
                else:
                    yield _checked(call.request)


def _checked(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise InvalidArgumentError("request", "its bytes are not a message of this method's type")
    bounds.check(request)
    return request


async def _checked_all(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
