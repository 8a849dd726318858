"""Who sends a request over HTTP, as the daemon's services ask for it."""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from loaderd.server.rpc.local import LocalCall


def caller(request: Request, user: str = "") -> LocalCall:
    """The call that a request makes.

    Args:
        request: The request; its bearer token is passed on.
        user: Who asks through this client, in the client's words. Users take turns in the queue
            as clients do.
    """
    client = request.client
    origin = "unknown"
    if client is not None:
        kind, host = ("ipv6", f"[{client.host}]") if ":" in client.host else ("ipv4", client.host)
        # What a client calls its users is none of the log's business.
        whose = hashlib.sha256(user.encode()).hexdigest()[:16] if user else str(client.port)
        origin = f"{kind}:{host}:{whose}"
    return LocalCall(origin, request.headers.get("authorization"))
