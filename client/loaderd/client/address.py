"""Where the daemon listens."""

from __future__ import annotations

import ipaddress
import os
import re

from loaderd.client.errors import InvalidArgumentError

DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"localhost:{DEFAULT_PORT}"
ADDRESS_VARIABLE = "LOADERD_ADDRESS"

_GRPC_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+)(?::(?P<port>\d{1,5}))?")


def resolve_address(address: str | None) -> str:
    """The gRPC target of an address.

    Args:
        address: `host`, `host:port`, `unix:/path`, the bare absolute path of a unix socket, or any
            gRPC target with its scheme. None: `$LOADERD_ADDRESS`, else `localhost:50051`.

    Raises:
        InvalidArgumentError: It is none of these.
    """
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if address.startswith("/"):
        return f"unix:{address}"
    if address.startswith(_GRPC_SCHEMES):
        return address
    match = _HOST_PORT.fullmatch(address)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise InvalidArgumentError.of(
            "address", f"{address!r} is no daemon address; use host:port or unix:/path/of/socket"
        )
    return f"{match['host']}:{port}"


def is_local(target: str) -> bool:
    """Whether what goes to a gRPC target surely stays on this box."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    match = _HOST_PORT.fullmatch(target)
    if match is None:  # of the other schemes some have several addresses
        return False
    try:
        return ipaddress.ip_address(match["host"].strip("[]")).is_loopback
    except ValueError:
        return match["host"] == "localhost"
