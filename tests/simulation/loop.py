"""An event loop whose time passes only when the simulation lets it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from random import Random
from typing import Any

_MOST_ROUNDS = 100_000
"""Of callbacks at one moment; whoever needs more waits by turning round and round."""
_SLOWEST_THREAD_S = 0.05


class Clock:
    """Seconds, as `time.monotonic` tells them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs all that is due, and jumps to what is due next. It waits for nothing real.

    Args:
        clock: Its time.
        random: How long work in threads takes; it is done by the loop itself.
    """

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._until = clock.now
        self._rounds = 0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        """Simulated monotonic seconds."""
        return self._clock.now

    def advance(self, seconds: float = 0.0) -> None:
        """Runs all that is due by then; with 0, what is due now.

        Raises:
            RuntimeError: Something at one moment never comes to an end.
        """
        self._until = self._clock.now + seconds
        self._rounds = 0
        self.run_forever()

    def run_in_executor(  # type: ignore[override]  # asyncio's own is generic in all arguments
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Calls `func` after a while; its future."""
        future = self.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(self._random.uniform(0, _SLOWEST_THREAD_S), run)
        return future

    def _jump(self, timeout: float | None) -> None:
        """Stands in for waiting: `timeout` seconds, or for ever."""
        self._rounds += 1
        if timeout is not None and timeout <= 0:
            if self._rounds > _MOST_ROUNDS:
                raise RuntimeError(f"for ever busy at {self._clock.now}")
        elif timeout is None or self._clock.now + timeout > self._until:
            self._clock.now = self._until
            self.stop()
        else:
            self._rounds = 0
            self._clock.now += timeout


class _Jumping(selectors.DefaultSelector):
    """Asks nobody for events, and tells how long the loop would have waited."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._jump(timeout)
        return []
