"""The workers of one model, and which of them a request goes to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.supervisor.supervisor import LoadedWorker
from loaderd.server.supervisor.worker import Worker
from loaderd.v1 import model_pb2

MOST_REPLICAS = 32
"""Of one model."""


def check_replicas(count: int) -> int:
    """The number of replicas that somebody asks for.

    Raises:
        InvalidArgumentError: It is out of bounds.
    """
    if not 1 <= count <= MOST_REPLICAS:
        raise InvalidArgumentError("replicas", f"{count} is not from 1 to {MOST_REPLICAS}")
    return count


@dataclass(frozen=True)
class ReplicaView:
    """A replica as it is at one moment.

    Attributes:
        number: Which of the model's.
        pid: The worker's process id.
        devices: Where its layers are.
        running: Requests that it works on.
        queued: Requests that wait for their turn on it.
        memory_bytes: What it held at its last heartbeat.
        leaving: It takes no more requests, and ends with those that it has.
        ready_at: When it was loaded.
    """

    number: int
    pid: int
    devices: tuple[str, ...]
    running: int
    queued: int
    memory_bytes: int
    leaving: bool
    ready_at: datetime


@dataclass(eq=False)
class Replica:
    """One worker that holds the model.

    Attributes:
        number: Unique in the model's life.
        worker: Its process.
        details: What it found when it loaded.
        requests: Requests on it that run or wait.
        turn: When it was last chosen, as a count of choices; 0: never.
        asker: Who asked it last; empty if unknown.
        leaving: It takes no more requests, and ends with those that it has.
        ending: It is being ended, and cannot be kept any more.
        quiet: Set while it has no requests.
        ready_at: When it was loaded.
    """

    number: int
    worker: Worker
    details: model_pb2.ModelDetails
    requests: int = 0
    turn: int = 0
    asker: str = ""
    leaving: bool = False
    ending: bool = False
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    ready_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        self.quiet.set()

    def view(self) -> ReplicaView:
        """The replica as it is now."""
        queued = self.worker.link.queued
        return ReplicaView(
            number=self.number,
            pid=self.worker.pid,
            devices=tuple(sorted(set(self.details.device_map.values()))),
            running=max(self.requests - queued, 0),
            queued=queued,
            memory_bytes=self.worker.link.memory_bytes,
            leaving=self.leaving,
            ready_at=self.ready_at,
        )


class Replicas:
    """The workers of one model.

    Attributes:
        wanted: How many are to serve.
        growing: Held while workers are started for the model, so that nobody else starts some.
    """

    def __init__(self) -> None:
        self.wanted = 1
        self.growing = asyncio.Lock()
        self._all: list[Replica] = []
        self._numbers = itertools.count(1)
        self._turns = itertools.count(1)

    @property
    def all(self) -> tuple[Replica, ...]:
        """All whose process lives, oldest first."""
        return tuple(self._all)

    @property
    def serving(self) -> tuple[Replica, ...]:
        """Those that take requests, oldest first."""
        return tuple(replica for replica in self._all if not replica.leaving)

    @property
    def missing(self) -> int:
        """How many more are wanted than serve."""
        return max(self.wanted - len(self.serving), 0)

    def are(self, count: int | None) -> bool:
        """Whether so many are wanted, serve, and stay as they are; None is any number."""
        if count is None:
            return True
        return count == self.wanted and not self.missing and not self.growing.locked()

    @property
    def memory_bytes(self) -> int:
        """What they held at their last heartbeats, together."""
        return sum(replica.worker.link.memory_bytes for replica in self._all)

    def statistics(self) -> model_pb2.ModelStatistics:
        """What their engines do and have done, together."""
        together = model_pb2.ModelStatistics()
        for replica in self._all:
            for figure, value in replica.worker.link.engine.read().ListFields():
                setattr(together, figure.name, getattr(together, figure.name) + value)
        return together

    def add(self, model: LoadedWorker) -> Replica:
        """A worker that serves from now on."""
        details = model.loaded.details
        details.worker_pid = model.worker.pid
        replica = Replica(next(self._numbers), model.worker, details)
        self._all.append(replica)
        return replica

    def remove(self, replica: Replica) -> None:
        """Forgets one whose process has ended."""
        self._all.remove(replica)

    def least_loaded(self, asker: str = "") -> Replica:
        """The one with the fewest requests.

        Of equals the one that `asker` asked last, which may still have the beginning of its prompt;
        else the one whose last turn was first.
        """

        def order(replica: Replica) -> tuple[bool, int, bool, int]:
            is_strange = not asker or replica.asker != asker
            return replica.worker.link.failed, replica.requests, is_strange, replica.turn

        return min(self.serving, key=order)

    @contextmanager
    def use(self, replica: Replica, asker: str = "") -> Iterator[Worker]:
        """Counts a request on a replica while it runs, and gives it the turn."""
        replica.turn, replica.asker = next(self._turns), asker
        replica.requests += 1
        replica.quiet.clear()
        try:
            yield replica.worker
        finally:
            replica.requests -= 1
            if not replica.requests:
                replica.quiet.set()

    def recall(self, most: int) -> None:
        """Keeps those that were to leave, the busiest first, until `most` serve."""
        leaving = [each for each in self._all if each.leaving and not each.ending]
        leaving.sort(key=lambda replica: -replica.requests)
        for replica in leaving[: max(most - len(self.serving), 0)]:
            replica.leaving = False

    def dismiss(self) -> Sequence[Replica]:
        """Lets those leave that are not wanted: of the least loaded ones the newest.

        Returns:
            Those that were not leaving before.
        """
        by_load = sorted(self.serving, key=lambda replica: (replica.requests, -replica.number))
        surplus = by_load[: max(len(by_load) - self.wanted, 0)]
        for replica in surplus:
            replica.leaving = True
        return surplus
