"""Waiting for what another process does, within a bound."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], patience_s: float = 30) -> None:
    """Returns when `condition` holds.

    Raises:
        TimeoutError: It did not within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)
