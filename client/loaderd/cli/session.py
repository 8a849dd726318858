"""What the global options say, for the commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import typer

    from loaderd.client import Client


@dataclass(frozen=True)
class Session:
    """The global options.

    Attributes:
        address: The daemon's address; None: the SDK's default.
        timeout: Seconds that each call may take; None: the SDK's defaults.
    """

    address: str | None
    timeout: float | None

    def connect(self) -> Client:
        """A client; use it as a context manager."""
        from loaderd.client import Client

        return Client(self.address)


def session_of(context: typer.Context) -> Session:
    """The session of the running command."""
    return cast("Session", context.obj)
