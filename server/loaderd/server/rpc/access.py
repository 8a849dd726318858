"""Admits gRPC's calls: who makes one, whether they may, and whether it is too many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from loaderd.server.access.caller import Caller
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.gate import Credentials, Gate
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role
from loaderd.server.logs.call import bind

Context = grpc.aio.ServicerContext[Any, Any]

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being served."""
    return _caller.get()


def caller_if_known() -> Caller | None:
    """Who makes the call that is being served; None if its credentials are wrong."""
    return _caller.get(None)


class Access:
    """Admits calls.

    Args:
        clients: See `Gate`.
        quotas: Counts what clients have.
        socket_role: See `Gate`.

    Attributes:
        gate: Says who calls; may be set at any time.
        quotas: What was given.
    """

    def __init__(
        self, clients: ClientsFile | None, quotas: Quotas, socket_role: Role = Role.ADMIN
    ) -> None:
        self.gate = Gate(clients, socket_role)
        self.quotas = quotas

    @contextmanager
    def admit(self, method: str, context: Context, *, streams: bool) -> Iterator[None]:
        """Runs a call as the one who makes it.

        Args:
            method: The method's path.
            context: The call.
            streams: Whether it answers with a stream.

        Raises:
            UnauthenticatedError, ForbiddenError: See `Gate.admit`.
            ClientLimitError: They have too many streams.
        """
        caller = self.gate.admit(method, _credentials(context), _set_caller)
        with ExitStack() as held:
            if streams:
                held.enter_context(self.quotas.stream(caller))
            yield


def _set_caller(caller: Caller) -> None:
    # Never reset: each call is a task of its own, with a context of its own.
    _caller.set(caller)
    bind(client=caller.name)


def _credentials(context: Context) -> Credentials:
    metadata: Any = context.invocation_metadata() or ()
    peer = str(context.peer())
    return Credentials(
        peer=peer,
        authorization=tuple(value for key, value in metadata if key == "authorization"),
        certificate=tuple(
            name.decode(errors="replace") for name in context.peer_identities() or ()
        ),
        over_socket=peer.startswith("unix:"),
    )
