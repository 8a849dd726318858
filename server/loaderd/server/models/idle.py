"""Models that nobody uses: they go after a while, or when another one needs their memory."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence

from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.record import ModelRecord
from loaderd.server.models.registry import ModelRegistry

logger = logging.getLogger(__name__)


class IdleModels:
    """Lets models that nobody uses go for others.

    Args:
        registry: Has the models.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def evictable(self) -> list[str]:
        """Ids of models that may go, the least recently used first."""
        unused = [record for record in self._registry.records() if self._is_unused(record)]
        unused.sort(key=lambda record: record.keep_alive.last_used or 0.0)
        return [record.id for record in unused]

    async def evict(self, model_ids: Sequence[str], newcomer: str) -> None:
        """Unloads models for another one and waits until their processes have ended.

        Args:
            model_ids: Of `evictable` and `leaving`, asked for just now.
            newcomer: For which, for the log.
        """
        going = [self._registry.find(model_id) for model_id in model_ids]
        unused = [record for record in going if record.state is ModelState.READY]
        if unused:
            ids = ", ".join(record.id for record in unused)
            logger.info("%s: unloaded for %s", ids, newcomer)
        for record in unused:
            self._registry.end(record, ChangeReason.EVICTED)
        await asyncio.gather(*(record.gone.wait() for record in going))

    async def dismissed(self) -> bool:
        """Waits for the end of replicas that are being ended; whether there were any."""
        ending = [
            replica.worker.wait()
            for record in self._registry.records()
            for replica in record.replicas.all
            if replica.ending
        ]
        await asyncio.gather(*ending)
        return bool(ending)

    def leaving(self) -> list[str]:
        """Ids of models that are being unloaded."""
        records = self._registry.records()
        return [record.id for record in records if record.state is ModelState.UNLOADING]

    def _is_unused(self, record: ModelRecord) -> bool:
        keep_alive = record.keep_alive
        return (
            record.is_alive
            and not (record.active_requests or keep_alive.is_pinned or keep_alive.is_new)
            and not record.replicas.growing.locked()
            and not self._registry.leases.of(record.id)
        )


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
        for record in self._registry.records():
            expiry = self._registry.expiry(record)
            if expiry <= now and record.is_alive:
                self._registry.end(record, ChangeReason.IDLE)
            elif now < expiry < math.inf:
                coming.append(expiry)
        return min(coming, default=None)

    async def _wait(self, until: float | None) -> None:
        try:
            seconds = None if until is None else max(until - time.monotonic(), 0.0)
            async with asyncio.timeout(seconds):
                await self._registry.use_changed.wait()
        except TimeoutError:
            pass  # somebody's time has come
