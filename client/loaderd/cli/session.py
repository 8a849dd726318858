"""What the global options say, for the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import typer

    from loaderd.client import Client


@dataclass(frozen=True)
class Session:
    """The global options.

    Attributes:
        address: The daemon's address; None: the SDK's default.
        daemon: The name of a daemon of the client's file, in place of an address.
        timeout: Seconds that each call may take; None: the SDK's defaults.
        token_file: File with the token.
        tls: Whether to speak TLS, also if none of the files is given.
        tls_ca: File with the certificates that the daemon's must be signed by.
        tls_cert: File with this client's certificate.
        tls_key: File with its private key.
        insecure: Whether the token may go over a network without TLS.
    """

    address: str | None
    daemon: str | None
    timeout: float | None
    token_file: Path | None
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    insecure: bool

    def connect(self) -> Client:
        """A client; use it as a context manager."""
        from loaderd.client import Client, Tls
        from loaderd.client.daemons import read_token

        files = (self.tls_ca, self.tls_cert, self.tls_key)
        return Client(
            self.address,
            daemon=self.daemon,
            token=None if self.token_file is None else read_token(self.token_file),
            tls=Tls(*files) if self.tls or any(files) else None,
            insecure=self.insecure,
        )


def session_of(context: typer.Context) -> Session:
    """The session of the running command."""
    return cast("Session", context.obj)
