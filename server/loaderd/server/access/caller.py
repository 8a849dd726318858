"""Who makes a call."""

from __future__ import annotations

from dataclasses import dataclass

from loaderd.server.access.roles import Role


@dataclass(frozen=True)
class Limits:
    """The most that one client may have; None: as much as the daemon has.

    Attributes:
        streams: Streams that are open at once.
        requests: Requests for text or to a tokenizer, running and waiting.
        tokens_per_minute: Tokens of prompts and outputs.
        models: Models that it has loaded and that are not unloaded.
    """

    streams: int | None = None
    requests: int | None = None
    tokens_per_minute: int | None = None
    models: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who makes a call.

    Attributes:
        name: Of the client; empty if nobody gave it one. Only those with a name have limits.
        role: What it may do.
        limits: How much of it.
    """

    name: str
    role: Role
    limits: Limits = Limits()

    @property
    def shown(self) -> str:
        """What to call it in texts for people."""
        return self.name or "who comes over the socket"


ANONYMOUS = Caller("", Role.ANONYMOUS)
"""Who has shown nothing that tells who it is."""

OWNER = Caller("", Role.ADMIN)
"""Who uses a daemon that does not ask who calls; and the daemon itself."""
