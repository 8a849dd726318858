"""Calls from inside the daemon, for what speaks to clients other than by gRPC.

They reach the same servicers that gRPC reaches, and so the same roles, limits and errors, without a
way through a socket. An error comes as the domain error that it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from loaderd.server.rpc.access import Access
from loaderd.server.rpc.clients import Clients


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
    """

    def __init__(self, servicers: Mapping[str, object], access: Access, clients: Clients) -> None:
        self._servicers = servicers
        self._access = access
        self._clients = clients

    async def unary(self, method: str, request: Message, call: LocalCall) -> Any:
        """Calls a method that answers once.

        Args:
            method: Such as `loaderd.v1.ModelService/ListModels`.
            request: Its request.
            call: Who calls.

        Raises:
            LoaderdError: It failed.
        """
        with self._admitted(method, call, streams=False):
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
        with self._admitted(method, call, streams=True):
            async with aclosing(self._handler(method)(request, call)) as responses:
                async for response in responses:
                    yield response

    @contextmanager
    def _admitted(self, method: str, call: LocalCall, *, streams: bool) -> Iterator[None]:
        context: Any = call  # what is asked of a context, it has
        with (
            self._clients.calling(call.peer()),
            self._access.admit(f"/{method}", context, streams=streams),
        ):
            yield

    def _handler(self, method: str) -> Any:
        service, _, name = method.rpartition("/")
        return getattr(self._servicers[service], name)
