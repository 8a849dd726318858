"""Unloads models that nobody uses."""

from __future__ import annotations

import asyncio
import time

from loaderd.server.models.lifecycle import ChangeReason
from loaderd.server.models.registry import ModelRegistry


class IdleUnloader:
    """Unloads each model when its keep-alive has passed since its last use.

    Args:
        registry: Has the models.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            self._registry.use_changed.clear()
            await self._wait(self._unload_expired())

    def _unload_expired(self) -> float | None:
        """Begins to unload those whose time has come; the time of the next, None for none."""
        now = time.monotonic()
        coming = []
        for record, expiry in self._registry.expiries():
            if expiry <= now:
                self._registry.retire(record, ChangeReason.IDLE)
            else:
                coming.append(expiry)
        return min(coming, default=None)

    async def _wait(self, until: float | None) -> None:
        try:
            seconds = None if until is None else max(until - time.monotonic(), 0.0)
            async with asyncio.timeout(seconds):
                await self._registry.use_changed.wait()
        except TimeoutError:
            pass  # somebody's time has come
