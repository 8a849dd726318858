"""What a model holds in its daemon and worker, as seen from outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from loaderd.client import AsyncGenerationStream, AsyncModel

_MIB = 2**20
_SPARE_FILES = 2
_SPARE_THREADS = 4
"""gRPC keeps some of its threads for a while."""
_SETTLE_S = 30.0
_LOOK_S = 0.1


@dataclass(frozen=True)
class Figure:
    """Something counted before and after a load.

    Attributes:
        what: What it is.
        before: Before the load.
        after: After it.
        spare: How many more there may be then; fewer are right, unless `exactly`.
        exactly: Whether there may be no fewer either.
    """

    what: str
    before: int
    after: int
    spare: int = 0
    exactly: bool = False

    @property
    def leaks(self) -> bool:
        """Whether something is left, or missing."""
        return self.after > self.before + self.spare or (self.exactly and self.after < self.before)


class Witness:
    """Compares a model's processes before and after a load.

    Requests, files, threads and the SDK's tasks must be as many as before, and every slot of the
    engine must take a request. Tasks of the daemon and anything else that it keeps for a request
    show as memory, whose growth is bounded.

    Args:
        model: The model; nobody uses it while the witness looks.
        processes: By what they are called.
        growth_mib: How much the memory of each may grow.
    """

    def __init__(
        self,
        model: AsyncModel,
        processes: Mapping[str, psutil.Process],
        growth_mib: Mapping[str, int],
    ) -> None:
        self._model = model
        self._processes = processes
        self._spare = {"tasks of the SDK": 0, "active requests": 0}
        for name in processes:
            self._spare[f"files of the {name}"] = _SPARE_FILES
            self._spare[f"threads of the {name}"] = _SPARE_THREADS
            self._spare[f"memory of the {name}, MiB"] = growth_mib[name]
        self._before: dict[str, int] = {}
        self._slots = 0

    async def look(self) -> None:
        """Notes what there is before the load."""
        await self._idle()
        self._slots = await usable_slots(self._model)
        await self._idle()
        self._before = await self._counts()

    async def look_again(self) -> Sequence[Figure]:
        """Compares, once things have settled, or did not for long."""
        await self._idle()
        slots = await usable_slots(self._model)
        deadline = time.monotonic() + _SETTLE_S
        while True:
            counts = await self._counts()
            figures = [
                Figure(what, self._before[what], count, self._spare[what])
                for what, count in counts.items()
            ]
            if not any(figure.leaks for figure in figures) or time.monotonic() > deadline:
                return [Figure("usable slots", self._slots, slots, exactly=True), *figures]
            await asyncio.sleep(_LOOK_S)

    async def _idle(self) -> None:
        """Until the daemon counts no request, or does so for longer than it should."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            if not (await self._model.refresh()).active_requests:
                return
            await asyncio.sleep(_LOOK_S)

    async def _counts(self) -> dict[str, int]:
        info = await self._model.refresh()
        counts = {
            "active requests": info.active_requests,
            "tasks of the SDK": len(asyncio.all_tasks()),
        }
        for name, process in self._processes.items():
            counts[f"files of the {name}"] = process.num_fds()
            counts[f"threads of the {name}"] = process.num_threads()
            counts[f"memory of the {name}, MiB"] = process.memory_info().rss // _MIB
        return counts


async def usable_slots(model: AsyncModel, offered: int = 80) -> int:
    """How many of so many long requests run at once; the others wait, and are told so.

    Raises:
        RuntimeError: One has ended before the last one was told.
    """
    streams = [
        model.stream("The", max_new_tokens=250, ignore_eos=True, bypass_prefix_cache=True)
        for _ in range(offered)
    ]
    readers = [asyncio.create_task(_read(stream)) for stream in streams]
    try:
        while not all(map(_is_told, streams)):
            if ended := next((reader for reader in readers if reader.done()), None):
                ended.result()
                raise RuntimeError("a request has ended before all others run or wait")
            await asyncio.sleep(_LOOK_S)
        return sum(stream.started is not None for stream in streams)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)


async def _read(stream: AsyncGenerationStream) -> None:
    async for _ in stream:
        pass


def _is_told(stream: AsyncGenerationStream) -> bool:
    return stream.started is not None or stream.queue_position is not None
