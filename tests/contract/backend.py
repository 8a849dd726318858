"""A daemon under test, and what the suite may ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

WAIT_S = 60.0
"""Bound of every wait of the suite."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One daemon. Everything but `uncached` and `stalled` is there before a test starts."""

    address: str
    model: str
    """A chat model that loads without a download, `org/name`."""
    missing: str
    """A name that the hub does not know."""
    missing_revision: str
    """`model`'s repository at a revision that it does not have."""
    uncached: str
    """A model that the hub has and the cache has not, when a test starts."""
    stalled: str
    """A model that the hub has, and whose download never ends by itself."""
    long: dict[str, Any]
    """Generation parameters that keep `model` busy for at least a second."""


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until the condition holds.

    Raises:
        TimeoutError: It does not within `WAIT_S`.
    """
    deadline = time.monotonic() + WAIT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true in time")
        await asyncio.sleep(0.01)
