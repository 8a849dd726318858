"""Lets callers in: says who they are, and refuses what their role may not call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from loaderd.server.access.caller import ANONYMOUS, OWNER, Caller
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.roles import Role, may_call
from loaderd.server.errors import ForbiddenError, LoaderdError, UnauthenticatedError

logger = logging.getLogger(__name__)

_SCHEME = "bearer"


@dataclass(frozen=True)
class Credentials:
    """What a call shows of who makes it.

    Attributes:
        peer: Where it comes from.
        authorization: The values of its header `authorization`.
        certificate: Names in the client certificate that TLS has verified: the alternative names,
            or the common name where there are none.
        over_socket: Whether it came over a unix socket.
    """

    peer: str
    authorization: tuple[str, ...] = ()
    certificate: tuple[str, ...] = ()
    over_socket: bool = False


class Gate:
    """Lets callers in.

    Args:
        clients: Who the clients are; None: whoever can connect may do everything.
        socket_role: What those are who come over a unix socket and show no token. Who they are
            is not known: the socket's mode and group decide who can connect.
    """

    def __init__(self, clients: ClientsFile | None, socket_role: Role) -> None:
        self._clients = clients
        self._socket_role = socket_role

    def admit(
        self,
        method: str,
        credentials: Credentials,
        on_known: Callable[[Caller], None] = lambda _: None,
    ) -> Caller:
        """Who makes a call.

        Args:
            method: The method's path.
            credentials: What the call shows.
            on_known: Told who it is, before it is seen whether they may.

        Raises:
            UnauthenticatedError: Nobody knows, and not everybody may.
            ForbiddenError: They may not.
        """
        try:
            caller = self._identify(credentials)
            on_known(caller)
            if not may_call(caller.role, method):
                raise _refusal(caller, method)
        except LoaderdError as error:
            logger.info("refused %s from %s: %s", method, credentials.peer, error)
            raise
        return caller

    def _identify(self, credentials: Credentials) -> Caller:
        names = credentials.certificate
        if self._clients is not None:
            if credentials.authorization:
                return self._clients.of_token(_bearer_token(credentials.authorization))
            if names and (client := self._clients.of_certificate(names)) is not None:
                return client
        if credentials.over_socket:
            return Caller("", self._socket_role)
        if self._clients is not None:
            return ANONYMOUS
        return Caller(names[0], Role.ADMIN) if names else OWNER


def _bearer_token(authorization: tuple[str, ...]) -> str:
    scheme, _, token = authorization[0].partition(" ")
    if len(authorization) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError("authorization must be given once, as 'Bearer TOKEN'")
    return token.strip()


def _refusal(caller: Caller, method: str) -> LoaderdError:
    if caller.role is Role.ANONYMOUS:
        return UnauthenticatedError("the call has neither a token nor a certificate that it knows")
    return ForbiddenError(
        caller.shown, caller.role, f"call {method.removeprefix('/').replace('/', '.')}"
    )
