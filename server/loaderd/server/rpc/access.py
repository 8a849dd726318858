"""Who makes a call, whether they may, and how much they have of what is limited."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from loaderd.server.access.caller import ANONYMOUS, OWNER, Caller
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role, may_call
from loaderd.server.errors import ForbiddenError, LoaderdError, UnauthenticatedError

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_SCHEME = "bearer"
_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being served."""
    return _caller.get()


class Access:
    """Admits calls.

    Args:
        clients: Who the clients are; None: whoever can connect is admitted.
        quotas: Counts what they have.
        socket_role: What those are who come over a unix socket and show no token. gRPC does not
            tell who they are: the socket's mode and group decide who can connect.

    Attributes:
        quotas: What was given.
    """

    def __init__(
        self, clients: ClientsFile | None, quotas: Quotas, socket_role: Role = Role.ADMIN
    ) -> None:
        self._clients = clients
        self.quotas = quotas
        self._socket_role = socket_role

    @contextmanager
    def admit(self, method: str, context: Context, *, streams: bool) -> Iterator[None]:
        """Runs a call as the one who makes it.

        Args:
            method: The method's path.
            context: The call.
            streams: Whether it answers with a stream.

        Raises:
            UnauthenticatedError: Nobody knows who makes it, and not everybody may.
            ForbiddenError: They may not.
            ClientLimitError: They have too many streams.
        """
        try:
            caller = self._identify(context)
            if not may_call(caller.role, method):
                raise _refusal(caller, method)
        except LoaderdError as error:
            logger.info("refused %s from %s: %s", method, context.peer(), error)
            raise
        # Never reset: each call is a task of its own, with a context of its own.
        _caller.set(caller)
        with ExitStack() as held:
            if streams:
                held.enter_context(self.quotas.stream(caller))
            yield

    def _identify(self, context: Context) -> Caller:
        names = [name.decode(errors="replace") for name in context.peer_identities() or ()]
        if self._clients is not None:
            if (token := _bearer_token(context)) is not None:
                return self._clients.of_token(token)
            if names and (client := self._clients.of_certificate(names)) is not None:
                return client
        if str(context.peer()).startswith("unix:"):
            return Caller("", self._socket_role)
        if self._clients is not None:
            return ANONYMOUS
        return Caller(names[0], Role.ADMIN) if names else OWNER


def _bearer_token(context: Context) -> str | None:
    metadata: Any = context.invocation_metadata() or ()
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        return None
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError("authorization must be given once, as 'Bearer TOKEN'")
    return str(token.strip())


def _refusal(caller: Caller, method: str) -> LoaderdError:
    if caller.role is Role.ANONYMOUS:
        return UnauthenticatedError("the call has neither a token nor a certificate that it knows")
    action = f"call {method.removeprefix('/').replace('/', '.')}"
    return ForbiddenError(caller.name or "who comes over the socket", caller.role, action)
