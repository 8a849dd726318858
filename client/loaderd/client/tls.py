"""TLS between the client and the daemon."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from loaderd.client.errors import InvalidArgumentError


@dataclass(frozen=True)
class Tls:
    """How to speak TLS with a daemon. All files are PEM.

    Attributes:
        ca: Certificates that the daemon's must be signed by. None: those that gRPC trusts, which
            are the public ones.
        certificate: This client's own certificate, for a daemon that asks for one.
        key: The private key of `certificate`.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials of a channel, from the files as they are now.

        Raises:
            InvalidArgumentError: One cannot be read, or half of a pair is missing.
        """
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgumentError.of("tls", "certificate and key go together; give both")
        return grpc.ssl_channel_credentials(
            _read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.certificate)
        )


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        problem = f"cannot read {os.fspath(path)}: {error.strerror}"
        raise InvalidArgumentError.of("tls", problem) from None
