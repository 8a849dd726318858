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
from loaderd.server.rpc.admission import Admission
from loaderd.server.rpc.call import code_of
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
        admission: Lets calls in.
    """

    def __init__(self, servicers: Mapping[str, object], admission: Admission) -> None:
        self._servicers = servicers
        self._admission = admission

    async def unary(self, method: str, request: Message, call: LocalCall) -> Any:
        """Calls a method that answers once.

        Args:
            method: Such as `loaderd.v1.ModelService/ListModels`.
            request: Its request.
            call: Who calls.

        Raises:
            LoaderdError: It failed.
        """
        with self._admitted(method, request, call, streams=False) as admitted:
            return await self._handler(method)(admitted, call)

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
        with self._admitted(method, request, call, streams=True) as admitted:
            async with aclosing(self._handler(method)(admitted, call)) as responses:
                async for response in responses:
                    yield response

    @contextmanager
    def _admitted(
        self, method: str, request: Message, call: LocalCall, *, streams: bool
    ) -> Iterator[Any]:
        context: Any = call  # what is asked of a context, it has
        told = self._admission.call(f"/{method}", request, context, begin(method))
        try:
            with self._admission.admit(told, streams=streams) as admitted:
                yield admitted
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
