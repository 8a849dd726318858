"""How a daemon is reached: its address, who the client is, and TLS."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc

from loaderd.client.address import ADDRESS_VARIABLE, is_local, resolve_address
from loaderd.client.daemons import named_daemon
from loaderd.client.errors import InvalidArgumentError
from loaderd.client.tls import Tls

DAEMON_VARIABLE = "LOADERD_DAEMON"
TOKEN_VARIABLE = "LOADERD_TOKEN"  # noqa: S105 - the name of a variable

Channel = TypeVar("Channel", grpc.Channel, grpc.aio.Channel)


@dataclass(frozen=True)
class Connection:
    """What a channel to a daemon is made of.

    Attributes:
        address: The gRPC target.
        token: What tells the daemon who calls; None for nothing.
        credentials: Of TLS; None for none.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)

    def authorized(self, channel: Channel) -> Channel:
        """The channel, whose calls all carry the token.

        gRPC itself gives tokens to channels with TLS only, and one on this box may have none.
        """
        if self.token is None:
            return channel
        return cast("Channel", _AuthorizedChannel(channel, self.token))


def resolve_connection(
    address: str | None,
    daemon: str | None,
    token: str | None,
    tls: Tls | bool | None,
    *,
    insecure: bool,
) -> Connection:
    """The connection that arguments, variables and the file of named daemons make together.

    Raises:
        InvalidArgumentError: They are wrong, or do not go together.
    """
    if address is not None and daemon is not None:
        raise InvalidArgumentError.of("daemon", "give an address or the name of a daemon, not both")
    if address is None and daemon is None and not os.environ.get(ADDRESS_VARIABLE):
        daemon = os.environ.get(DAEMON_VARIABLE) or None
    if daemon is not None:
        named = named_daemon(daemon)
        address = named.address
        token = named.token if token is None else token
        tls = named.tls if tls is None else tls
        insecure = insecure or named.insecure
    elif token is None:  # a daemon of the file gets no token but its own
        token = os.environ.get(TOKEN_VARIABLE) or None
    target = resolve_address(address)
    tls = Tls() if tls is True else tls or None
    if tls is not None and target.startswith("unix"):
        raise InvalidArgumentError.of("tls", "a unix socket has none; leave it out")
    _check_token(token, target, is_protected=tls is not None or insecure)
    return Connection(target, token, None if tls is None else tls.credentials())


def _check_token(token: str | None, target: str, *, is_protected: bool) -> None:
    if token is None:
        return
    if re.fullmatch(r"[!-~]+", token) is None:
        raise InvalidArgumentError.of("token", "must be printable ASCII without spaces")
    if not is_protected and not is_local(target):
        problem = (
            f"would go to {target} without protection; use tls, or allow it with insecure if the "
            "network is safe"
        )
        raise InvalidArgumentError.of("token", problem)


class _AuthorizedChannel:
    """Makes the methods of a channel, each of which carries a token."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel, token: str) -> None:
        self._channel: Any = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *args: Any, **kwargs: Any) -> _AuthorizedMethod:
        return _AuthorizedMethod(self._channel.unary_unary(*args, **kwargs), self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> _AuthorizedMethod:
        return _AuthorizedMethod(self._channel.unary_stream(*args, **kwargs), self._metadata)


class _AuthorizedMethod:
    """A method of a stub, blocking or of asyncio, whose calls carry some metadata more."""

    def __init__(self, method: Any, metadata: Sequence[tuple[str, str]]) -> None:
        self._method = method
        self._metadata = metadata

    def __call__(self, request: Any, timeout: float | None = None, **options: Any) -> Any:
        return self._method(request, timeout=timeout, **self._with_metadata(options))

    def with_call(self, request: Any, timeout: float | None = None, **options: Any) -> Any:
        return self._method.with_call(request, timeout=timeout, **self._with_metadata(options))

    def future(self, request: Any, timeout: float | None = None, **options: Any) -> Any:
        return self._method.future(request, timeout=timeout, **self._with_metadata(options))

    def _with_metadata(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "metadata": (*(options.get("metadata") or ()), *self._metadata)}
