"""How fast something grows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 10.0


class Rate:
    """The rate of the last ten seconds, or of the time since the start if that is less.

    Args:
        clock: Seconds from an arbitrary moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: float | None = None
        self._last = 0
        self._gains: deque[tuple[float, int]] = deque()

    def update(self, total: int) -> float:
        """Notes how much there is now.

        Args:
            total: The first counts as what was there before; one that falls as no gain.

        Returns:
            Units a second.
        """
        now = self._clock()
        if self._start is None:
            self._start = now
        elif total > self._last:
            self._gains.append((now, total - self._last))
        self._last = total
        while self._gains and self._gains[0][0] <= now - WINDOW_SECONDS:
            self._gains.popleft()
        seconds = min(WINDOW_SECONDS, now - self._start)
        return sum(gain for _, gain in self._gains) / seconds if seconds else 0.0
