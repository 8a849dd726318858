"""Who calls."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MEMORY_S = 60.0


class Clients:
    """The clients that have a call under way, or had one within the last minute.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls = Counter[str]()
        self._left: OrderedDict[str, float] = OrderedDict()  # those whose last call ended first

    @contextmanager
    def calling(self, peer: str) -> Iterator[None]:
        """Counts a call while it runs.

        Args:
            peer: As gRPC names the connection; it is the same for all of a unix socket.
        """
        self._forget()
        self._left.pop(peer, None)
        self._calls[peer] += 1
        try:
            yield
        finally:
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]
                self._left[peer] = self._clock()

    def count(self) -> int:
        """How many there are."""
        self._forget()
        return len(self._calls) + len(self._left)

    def _forget(self) -> None:
        """Takes as long as there are clients to forget, however many are known."""
        since = self._clock() - MEMORY_S
        while self._left and next(iter(self._left.values())) < since:
            self._left.popitem(last=False)
