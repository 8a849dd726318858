"""TLS of the daemon: its certificate, and what its clients' must be signed by."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from loaderd.server.config import ConfigError

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ServerTls:
    """The files of TLS, as PEM.

    Attributes:
        certificate: The daemon's certificate and its chain.
        key: Its private key.
        client_ca: What the certificates of clients must be signed by; None asks for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of one address to listen on.

        Raises:
            ConfigError: The files cannot be used.
        """
        try:
            files = _WatchedFiles(self)
        except OSError as error:  # ssl's errors are among them
            raise ConfigError(f"tls_cert, tls_key: {self.problem(error)}") from error
        return grpc.dynamic_ssl_server_credentials(
            files.current,
            files.changed,  # type: ignore[arg-type]  # it may return None, says gRPC itself
            require_client_authentication=self.client_ca is not None,
        )

    def read(self) -> tuple[Stamp, grpc.ServerCertificateConfiguration]:
        """What the files have, checked, and when they were written.

        Raises:
            OSError: They cannot be read, or do not fit together.
        """
        while True:
            stamp = self.stamp()
            trial = self.context()
            if self.client_ca is not None:
                trial.load_verify_locations(self.client_ca)
            pair = self.key.read_bytes(), self.certificate.read_bytes()
            client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
            if stamp == self.stamp():  # nobody has written meanwhile
                return stamp, grpc.ssl_server_certificate_configuration([pair], client_ca)

    def context(self) -> ssl.SSLContext:
        """The certificate and its key as the standard library has them.

        Raises:
            OSError: They cannot be read, or do not fit together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(self.certificate, self.key, password="")
        return context

    def stamp(self) -> Stamp:
        """What changes when one of the files does.

        Raises:
            OSError: One is not there.
        """
        stats = [file.stat() for file in self._files]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)

    def problem(self, error: OSError) -> str:
        """What is wrong with the files, for people."""
        files = ", ".join(map(str, self._files))
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or "not PEM").lower().replace("_", " ")
            return (
                f"{files} cannot be used ({reason}): they must be PEM, the key that of the "
                "certificate and without a password"
            )
        return f"{error.filename or files}: {error.strerror}"

    @property
    def _files(self) -> list[Path]:
        files = (self.certificate, self.key, self.client_ca)
        return [file for file in files if file is not None]


class _WatchedFiles:
    """Files that may be replaced while the daemon listens.

    They are looked at for each new connection, and read when one has changed. What does not fit
    together, such as a new certificate whose key has not come yet, changes nothing: the
    connection gets what there was.

    Attributes:
        current: What they had at the start.

    Raises:
        OSError: See `ServerTls.read`.
    """

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._seen: Stamp | None
        self._seen, self.current = tls.read()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new since the last time, or None. gRPC asks from threads of its own."""
        try:
            found: Stamp | None = self._tls.stamp()
        except OSError:
            found = None
        if found == self._seen:
            return None
        self._seen = found  # files that are wrong are told of once
        try:
            self._seen, configuration = self._tls.read()
        except OSError as error:
            logger.error("TLS stays as it is: %s", self._tls.problem(error))
            return None
        logger.info("TLS has new files")
        return configuration
