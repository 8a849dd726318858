"""Addresses that the daemon listens on."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")
_UNIX = "unix:"


def is_loopback(host: str) -> bool:
    """Whether a host is this box as it calls itself, which others do not reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class TcpAddress:
    """A host and a port, 0 for a free one."""

    host: str
    port: int

    @property
    def is_exposed(self) -> bool:
        """Whether other machines may reach it."""
        return not is_loopback(self.host)

    def with_port(self, port: int) -> TcpAddress:
        """The same host at another port."""
        return TcpAddress(self.host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """The path of a unix socket."""

    path: Path

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """An address from `host:port`, `[ipv6]:port` or `unix:/path`.

    Raises:
        ValueError: It is none of these.
    """
    if text.startswith((_UNIX, "/")):
        path = Path(text.removeprefix(_UNIX)).expanduser()
        if path.is_absolute():
            return UnixAddress(path)
    elif match := _HOST_PORT.fullmatch(text):
        port = int(match["port"])
        if port < 65536:
            return TcpAddress(match["host"].strip("[]"), port)
    raise ValueError(f"{text!r} is no address: use host:port, [ipv6]:port or unix:/path/of/socket")
