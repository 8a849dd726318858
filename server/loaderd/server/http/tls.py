"""TLS of HTTP: the daemon's certificate, also when it is replaced."""

from __future__ import annotations

import logging
import ssl

from loaderd.server.config import ConfigError
from loaderd.server.rpc.tls import ServerTls

logger = logging.getLogger(__name__)


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """A context that looks at the files for each new connection.

    What does not fit together changes nothing. No certificates are asked of clients: over HTTP they
    are known by their tokens.

    Args:
        tls: The files.

    Raises:
        ConfigError: They cannot be used.
    """
    try:
        seen, context = tls.stamp(), tls.context()
    except OSError as error:
        raise ConfigError(f"TLS: {tls.problem(error)}") from error
    current = context

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: object) -> None:
        nonlocal seen, current
        try:
            found = tls.stamp()
            if found != seen:
                seen = found  # files that are wrong are told of once
                current = tls.context()
        except OSError as error:
            logger.error("TLS of HTTP stays as it is: %s", tls.problem(error))
        connection.context = current

    context.set_servername_callback(choose)
    return context
