"""How long a model stays loaded that nobody uses."""

from __future__ import annotations

import math
from collections.abc import Callable

PINNED = math.inf
"""The keep-alive of a model that only a client unloads."""
LONGEST_S = 366 * 24 * 3600.0
"""The longest of one that ends."""
_FIRST_USE_S = 300.0
_HANDING_OVER_S = 1.0
"""Longer than it takes whoever waited for a load to be told of its end."""


class KeepAlive:
    """When one model was used, and when that was too long ago.

    Args:
        seconds: How long it stays after its last use; 0: not at all, though it waits some minutes
            for its first use; `PINNED`: for ever.
        clock: Monotonic seconds.

    Attributes:
        seconds: As above; may be set at any time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds = seconds
        self._clock = clock
        self._last_used: float | None = None
        self._was_used = False
        self._new_until = -math.inf

    @property
    def is_new(self) -> bool:
        """Whether it has just come to be READY and those who waited for it may not know yet."""
        return self._clock() < self._new_until

    @property
    def is_pinned(self) -> bool:
        """Whether only a client unloads it."""
        return self.seconds == PINNED

    @property
    def last_used(self) -> float | None:
        """Monotonic time at which it was READY or a use of it ended, the later; None before."""
        return self._last_used

    def ready(self) -> None:
        """It is READY, and nobody has it yet."""
        self.given()
        self._new_until = self._clock() + _HANDING_OVER_S

    def given(self) -> None:
        """A load gives it to somebody, who has not used it yet."""
        self._last_used = self._clock()
        self._was_used = False
        self._new_until = -math.inf

    def held(self, until: float) -> None:
        """A lease has held it until that monotonic time."""
        if self._last_used is not None:
            self._last_used = max(self._last_used, until)
            self._was_used = True

    def used(self) -> None:
        """A use of it ends now."""
        self.held(self._clock())

    def expiry(self) -> float:
        """Monotonic time at which it is to go if nobody uses it before; infinity for never."""
        if self._last_used is None:
            return math.inf
        seconds = self.seconds if self.seconds or self._was_used else _FIRST_USE_S
        return max(self._last_used + seconds, self._new_until)
