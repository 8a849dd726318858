"""Clients that do what they please, and what came of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from loaderd.client import AsyncClient, AsyncModel, errors
from tests.daemon import SpawnedDaemon

_DOCUMENTED = {
    "MODEL_NOT_LOADED",
    "MODEL_UNLOADED",
    "MODEL_IN_USE",
    "WORKER_DIED",
    "QUEUE_FULL",
    "DEVICE_MEMORY",
    "LEASE_NOT_FOUND",
}
"""What may be told to somebody beside whom models are unloaded and workers killed."""
_PATIENCE_S = 120.0
_MOST_TOKENS = 40


@dataclass
class Outcomes:
    """How what was begun has ended.

    Attributes:
        ended: By what was done and how it ended.
        defects: Of that, what must not be.
        kills: Workers killed.
    """

    ended: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)
    kills: int = 0


class Clients:
    """Acts at random until a time, with a seed.

    Args:
        daemon: The daemon.
        models: Folders.
        seed: Of what is done.
    """

    def __init__(self, daemon: SpawnedDaemon, models: Sequence[Path], seed: int) -> None:
        self.outcomes = Outcomes()
        self._daemon = daemon
        self._models = [str(model) for model in models]
        self._seed = seed

    async def run(self, seconds: float, count: int, kill_every_s: float) -> None:
        """So many clients at once, and one more that kills workers."""
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill(until, kill_every_s))
            for number in range(count):
                group.create_task(self._act(until, Random(self._seed * 1000 + number)))

    async def _act(self, until: float, random: Random) -> None:
        actions = {
            "generate": self._generate,
            "cancel": self._cancel,
            "load": self._load,
            "unload": self._unload,
            "force": self._force,
            "lease": self._lease,
        }
        async with AsyncClient(self._daemon.address) as client:
            while asyncio.get_running_loop().time() < until:
                (name,) = random.choices(list(actions), weights=(10, 4, 2, 1, 1, 2))
                model = random.choice(self._models)
                await self._note(name, actions[name](client, model, random))

    async def _note(self, name: str, action: object) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await action  # type: ignore[misc]  # a coroutine of one of the actions
            outcome = "done"
        except errors.LoaderdError as error:
            outcome = error.reason or error.code.name
            if outcome not in _DOCUMENTED:
                self.outcomes.defects[f"{name}: {outcome}: {error}"] += 1
        except TimeoutError:
            outcome = "never ended"
            self.outcomes.defects[f"{name}: {outcome}"] += 1
        self.outcomes.ended[f"{name}: {outcome}"] += 1

    async def _generate(self, client: AsyncClient, model: str, random: Random) -> None:
        loaded = await client.load(model, keep_alive=random.choice((0, 1, 5, 60, -1)))
        tokens = random.randint(1, _MOST_TOKENS)
        result = await loaded.generate("Once", max_new_tokens=tokens, ignore_eos=True)
        if result.usage.generated_tokens != tokens:
            self.outcomes.defects["generate: tokens are missing"] += 1

    async def _cancel(self, client: AsyncClient, model: str, random: Random) -> None:
        loaded = await client.load(model)
        stream = loaded.stream("Once", max_new_tokens=200, ignore_eos=True)
        async for _ in stream:
            if random.random() < 0.2:
                break
        stream.cancel()

    async def _load(self, client: AsyncClient, model: str, random: Random) -> None:
        operation = client.start_load(model, dtype=random.choice((None, "float32")))
        if random.random() < 0.3:
            await asyncio.sleep(random.uniform(0, 0.5))
            operation.cancel()
            return
        await operation.result()

    async def _unload(self, client: AsyncClient, _model: str, random: Random) -> None:
        await self._one_of(await client.models(), random).unload()

    async def _force(self, client: AsyncClient, _model: str, random: Random) -> None:
        grace = random.choice((None, 0.5, 5))
        await self._one_of(await client.models(), random).unload(force=True, grace=grace)

    async def _lease(self, client: AsyncClient, model: str, _random: Random) -> None:
        async with await client.lease(model, ttl=30) as lease:
            await lease.model.generate("Once", max_new_tokens=4)
            await lease.renew()

    def _one_of(self, models: Sequence[AsyncModel], random: Random) -> AsyncModel:
        if not models:
            raise errors.ModelNotLoadedError("none is loaded")
        return random.choice(models)

    async def _kill(self, until: float, every_s: float) -> None:
        random = Random(self._seed)
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(random.uniform(0.5, 1.5) * every_s)
            workers = self._daemon.workers()
            if workers:
                os.kill(random.choice(workers).pid, signal.SIGKILL)
                self.outcomes.kills += 1
