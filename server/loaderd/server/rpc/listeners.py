"""The addresses that clients reach: TCP, with TLS or without, and unix sockets."""

from __future__ import annotations

import fcntl
import grp
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.addresses import Address, TcpAddress
from loaderd.server.rpc.server import RpcServer
from loaderd.server.rpc.tls import ServerTls


class AddressError(Exception):
    """The address cannot be listened on. Its text says which and what to do."""


@dataclass(frozen=True)
class SocketAccess:
    """Who may open unix sockets.

    Attributes:
        mode: As chmod takes it.
        group: Name or number; None for the daemon's own.
    """

    mode: int = 0o600
    group: str | None = None


@contextmanager
def listening(
    server: RpcServer, addresses: Sequence[Address], tls: ServerTls | None, access: SocketAccess
) -> Iterator[list[str]]:
    """Binds a server that is not started yet; its unix sockets are removed at the end.

    Args:
        server: The server.
        addresses: Where to listen.
        tls: Of TCP addresses; None listens in the clear.
        access: Of unix sockets.

    Yields:
        Where it listens, with the ports that it got.

    Raises:
        AddressError: An address cannot be listened on.
        ConfigError: The files of TLS cannot be used.
    """
    with ExitStack() as held:
        bound = []
        for address in addresses:
            if isinstance(address, TcpAddress):
                bound.append(str(_bind_tcp(server, address, tls)))
            else:
                held.enter_context(_locked(address.path))
                _bind_socket(server, address.path, access)
                bound.append(str(address))
        yield bound


def _bind_tcp(server: RpcServer, address: TcpAddress, tls: ServerTls | None) -> TcpAddress:
    credentials = None if tls is None else tls.credentials()
    try:
        return address.with_port(server.bind(str(address), credentials))
    except RuntimeError as error:
        raise AddressError(
            f"cannot listen on {address}: the port is taken, perhaps by another daemon, or the "
            "host is not this box; choose another --port (0: a free one) or --host"
        ) from error


def _bind_socket(server: RpcServer, path: Path, access: SocketAccess) -> None:
    # Nobody else can open it before it has its group and mode.
    before = os.umask(0o177)
    try:
        server.bind(f"unix:{path}")
    except RuntimeError as error:
        raise AddressError(f"cannot listen on the socket {path}") from error
    finally:
        os.umask(before)
    try:
        if access.group is not None:
            os.chown(path, -1, _group_id(access.group))
        path.chmod(access.mode)
    except OSError as error:
        raise AddressError(
            f"cannot give the socket {path} its group and mode: {error.strerror}; the user that "
            "the daemon runs as must be in the group"
        ) from error


def _group_id(group: str) -> int:
    return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid


@contextmanager
def _locked(socket: Path) -> Iterator[None]:
    """Holds the socket's path: a second server would take it from the first without a word.

    Raises:
        AddressError: Another daemon holds it, or its folder cannot be written to.
    """
    lock = socket.with_name(socket.name + ".lock")
    try:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AddressError(f"cannot use the socket {socket}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AddressError(f"another daemon listens on the socket {socket}") from error
        if socket.exists() and not socket.is_socket():
            raise AddressError(f"{socket} exists and is not a socket")
        socket.unlink(missing_ok=True)  # left by a daemon that was killed
        yield
        socket.unlink(missing_ok=True)
    finally:
        os.close(handle)
