"""Calls from inside the daemon, for what speaks to clients other than by gRPC.

They reach the same servicers that gRPC reaches, and so the same roles, bounds, limits and errors,
without a way through a socket. An error comes as the domain error that it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from loaderd.server.errors import LoaderdError
from loaderd.server.logs.audit import AuditLog
from loaderd.server.rpc import bounds
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.call import Call, code_of
from loaderd.server.rpc.clients import Clients
from loaderd.server.tracing.spans import begin


@dataclass(frozen=True)
class LocalCall:
    """What servicers ask of a call's context.

    Attributes:
        origin: Where it comes from, as gRPC would tell it: `ipv4:127.0.0.1:4711`.
        authorization: The value of that header; None where there is none.
    """

    origin: str
    authorization: str | None = None

    def peer(self) -> str:
        """Where the call comes from."""
        return self.origin

    def peer_identities(self) -> tuple[bytes, ...] | None:
        """Names of the client's certificate: it has shown none."""
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers that say who calls."""
        return () if self.authorization is None else (("authorization", self.authorization),)


class LocalCalls:
    """Calls the daemon's services. Each call is to be made in a task of its own.

    Args:
        servicers: By the full names of their services.
        access: Admits calls.
        clients: Counts who calls.
        audit: Told what administrators do; None: nobody asked.
    """

    def __init__(
        self,
        servicers: Mapping[str, object],
        access: Access,
        clients: Clients,
        audit: AuditLog | None = None,
    ) -> None:
        self._servicers = servicers
        self._access = access
        self._clients = clients
        self._audit = audit

    async def unary(self, method: str, request: Message, call: LocalCall) -> Any:
        """Calls a method that answers once.

        Args:
            method: Such as `loaderd.v1.ModelService/ListModels`.
            request: Its request.
            call: Who calls.

        Raises:
            LoaderdError: It failed.
        """
        with self._admitted(method, request, call, streams=False):
            return await self._handler(method)(request, call)

    async def stream(
        self, method: str, request: Message, call: LocalCall
    ) -> AsyncGenerator[Any, None]:
        """Calls a method that answers with a stream; closing it ends the call.

        Args:
            method: Such as `loaderd.v1.GenerationService/StreamGenerate`.
            request: Its request.
            call: Who calls.

        Raises:
            LoaderdError: It failed.
        """
        with self._admitted(method, request, call, streams=True):
            async with aclosing(self._handler(method)(request, call)) as responses:
                async for response in responses:
                    yield response

    @contextmanager
    def _admitted(
        self, method: str, request: Message, call: LocalCall, *, streams: bool
    ) -> Iterator[None]:
        context: Any = call  # what is asked of a context, it has
        path = f"/{method}"
        told = Call(path, request, context, self._audit, begin(method))
        try:
            with self._clients.calling(call.peer()):
                told.identify()
                with self._access.admit(path, context, streams=streams):
                    bounds.check(request)
                    yield
        except LoaderdError as error:
            told.tell(code_of(error), error.reason)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            told.tell("CANCELLED")
            raise
        except Exception:
            told.tell("INTERNAL")
            raise
        else:
            told.tell("OK")

    def _handler(self, method: str) -> Any:
        service, _, name = method.rpartition("/")
        return getattr(self._servicers[service], name)
