"""Who calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MEMORY_S = 60.0


@dataclass
class _Client:
    calls: int
    last: float


class Clients:
    """The clients that have a call under way, or had one within the last minute.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: dict[str, _Client] = {}

    @contextmanager
    def calling(self, peer: str) -> Iterator[None]:
        """Counts a call while it runs.

        Args:
            peer: As gRPC names the connection; it is the same for all of a unix socket.
        """
        if peer not in self._clients:
            self._forget()
        client = self._clients.setdefault(peer, _Client(0, 0.0))
        client.calls += 1
        try:
            yield
        finally:
            client.calls -= 1
            client.last = self._clock()

    def count(self) -> int:
        """How many there are."""
        self._forget()
        return len(self._clients)

    def _forget(self) -> None:
        since = self._clock() - MEMORY_S
        self._clients = {
            peer: each for peer, each in self._clients.items() if each.calls or each.last >= since
        }
