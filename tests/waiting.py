"""Waiting for what another process does, within a bound."""

import asyncio
import time
from collections.abc import Callable


def until(condition: Callable[[], bool], patience_s: float = 60, interval_s: float = 0.02) -> None:
    """Returns when `condition` holds.

    Raises:
        TimeoutError: It did not within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(interval_s)


async def until_in_loop(condition: Callable[[], bool], patience_s: float = 60) -> None:
    """As `until`, for what happens in this event loop."""
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.01)
