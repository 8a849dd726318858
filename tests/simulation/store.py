"""The model files of a simulated box: names, commits, sizes, and a hub that may be away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loaderd.server.errors import HubUnreachableError, ModelNotFoundError, RevisionNotFoundError
from loaderd.server.single_flight import Publish, SingleFlight
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.pins import Pin, Pins
from loaderd.server.store.plan import DownloadProgress, DownloadState
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder, NotCached
from loaderd.server.store.shape import ModelShape

COMMITS = {"main": "a" * 40, "v1": "a" * 40, "next": "b" * 40}
"""Of every repository."""
LOCAL = ("/models/tiny", "/models/small", "/models/half", "/models/most")
HUB = ("org/small", "org/small@v1", "org/small@next", "org/wide")
HUGE, MISSING = "/models/huge", "/models/missing"
NAMES = (*LOCAL, *HUB, HUGE, MISSING)

_SHARES = {"tiny": 0.02, "small": 0.15, "half": 0.4, "most": 0.7, "wide": 1.2, "huge": 40.0}
"""Of the largest device, by the last part of a name: what a model's weights take."""
_SIZES = {
    "layers": 32,
    "heads": 32,
    "hidden_size": 4096,
    "vocabulary_size": 32_000,
    "context_length": 8192,
}


@dataclass
class SimulatedStore:
    """Knows which commit each revision is, and downloads in its own time.

    Attributes:
        largest_bytes: Memory of the largest device, which the models' sizes are shares of.
        random: How long everything takes.
        cached: Repository and commit of what is there.
        is_hub_away: Whether downloads fail.
    """

    largest_bytes: int
    random: Random

    def __post_init__(self) -> None:
        self.cached: set[tuple[str, str]] = set()
        self.is_hub_away = False
        self.pins = Pins()
        self.flights: SingleFlight[HubName, DownloadState, CachedSnapshot] = SingleFlight()

    async def resolve(self, name: HubName | LocalName) -> LocalFolder | CachedSnapshot | NotCached:
        await self._while()
        if isinstance(name, LocalName):
            if name.path == Path(MISSING):
                raise ModelNotFoundError(model=str(name))
            return LocalFolder(name.path, 10)
        commit = COMMITS.get(name.revision, name.revision)
        is_there = (name.repo_id, commit) in self.cached
        return self._snapshot(name, commit) if is_there else NotCached(name)

    def download(self, name: HubName) -> Any:
        return self.flights.join(name, lambda publish: self._download(name, publish))

    async def hold(self, files: CachedSnapshot, holder: str) -> Pin:
        await self._while()
        return self.pins.hold(files.repo_id, files.commit, holder)

    async def prove(self, files: CachedSnapshot, publish: Callable[[Any], None]) -> None:
        await self._while()

    def allows_pickle(self, name: HubName | LocalName) -> bool:
        return False

    def delete(self) -> None:
        """Somebody deletes all that nobody uses."""
        self.cached = set(self.pins.all())

    def shape(self, path: Path, model: str, *, allow_pickle: bool) -> ModelShape:
        """Stands in for `read_shape`."""
        numbers = int(_SHARES[path.name] * self.largest_bytes) // 2
        return ModelShape(numbers, 2 * numbers, numbers // 8, numbers // 8, False, _SIZES)

    async def _download(self, name: HubName, publish: Publish[DownloadState]) -> CachedSnapshot:
        for come in (0, 5, 10):
            publish(DownloadState(None, DownloadProgress(come, 10, 0, 1)))
            await asyncio.sleep(self.random.uniform(0, 5))
        if self.is_hub_away:
            raise HubUnreachableError(model=str(name))
        commit = COMMITS.get(name.revision, name.revision)
        if commit not in COMMITS.values():
            raise RevisionNotFoundError(model=name.repo_id, revision=name.revision)
        self.cached.add((name.repo_id, commit))
        return self._snapshot(name, commit)

    async def _while(self) -> None:
        """As long as disks take."""
        await asyncio.sleep(self.random.choice((0, 0.01, 0.1)))

    def _snapshot(self, name: HubName, commit: str) -> CachedSnapshot:
        path = Path("/cache", commit, name.repo_id.partition("/")[2])
        return CachedSnapshot(name.repo_id, name.revision, commit, path, 10)
