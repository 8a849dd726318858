"""What must hold after every step, whatever came before."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loaderd.server.errors import DrainingError
from loaderd.server.models.events import ModelEvent, Subscription
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.lifecycle import TRANSITIONS, ChangeReason, ModelState
from loaderd.server.models.placement import Holder
from loaderd.server.models.record import is_model_id
from tests.simulation.daemon import SimulatedDaemon
from tests.simulation.hardware import Card
from tests.simulation.loop import Clock


@dataclass
class KnownLease:
    """A lease as its client knows it.

    Attributes:
        model_id: What it holds.
        ttl_s: Seconds that each renewal gives it.
        expires: Monotonic time until which it holds for certain.
    """

    model_id: str
    ttl_s: float
    expires: float


@dataclass(frozen=True)
class Rest:
    """What a daemon has, to be compared before and after.

    Attributes:
        missing: Bytes that are free and that it does not believe to be, by device.
        reserved: By whom memory is reserved.
        workers: That live.
        tasks: Of its event loop, by what they do.
        pins: On snapshots.
        leases: On models.
        flights: Loads under way.
        expected: Workers that were to attach and never did.
        health: Ids of models that the health service knows.
    """

    missing: Mapping[str, int]
    reserved: Sequence[Holder]
    workers: int
    tasks: Mapping[str, int]
    pins: Mapping[tuple[str, str], tuple[str, ...]]
    leases: int
    flights: int
    expected: int
    health: int


class Watcher:
    """Follows a daemon and looks for what must not be.

    Args:
        daemon: The daemon.
        clock: Its time.
        loop: What it runs in.

    Attributes:
        leases: What clients hold, by id.
        forcing: Names and ids of models that somebody unloads by force now.
        forced: Ids of models that were unloaded so.
        events: How many there were.
        problems: What was found, as sentences.
    """

    def __init__(
        self, daemon: SimulatedDaemon, clock: Clock, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.leases: dict[str, KnownLease] = {}
        self.forcing: Counter[str] = Counter()
        self.forced: set[str] = set()
        self.events = 0
        self.problems: list[str] = []
        self._daemon = daemon
        self._clock = clock
        self._loop = loop
        self._states: dict[str, ModelState] = {}
        self._failed: set[str] = set()

    async def follow(self) -> None:
        """Reads all events until the daemon drains."""
        with self._daemon.registry.events.subscribe() as events, suppress(DrainingError):
            await self._read(events)

    async def _read(self, events: Subscription) -> None:
        async for event in events:
            self.events += 1
            if event.sequence != self.events:
                self.problems.append(f"event {event.sequence} follows {self.events - 1}")
            self._check_transition(event)
            if event.model.state is ModelState.UNLOADING:
                self._check_unused(event)

    def _check_transition(self, event: ModelEvent) -> None:
        model, state, known = event.model.id, event.model.state, self._states.get(event.model.id)
        if event.previous is not known:
            self.problems.append(f"{model}: was {known}, and the event says {event.previous}")
        if known is None and state is not ModelState.RESOLVING:
            self.problems.append(f"{model}: begins as {state}")
        elif known is not None and state not in TRANSITIONS[known]:
            self.problems.append(f"{model}: {known} -> {state}")
        self._states[model] = state
        if state is ModelState.FAILED:
            self._failed.add(model)
        if state is ModelState.UNLOADED:
            del self._states[model]

    def _check_unused(self, event: ModelEvent) -> None:
        """Whether a model goes that somebody uses, holds or has pinned."""
        model, reason = event.model, event.reason
        if reason is ChangeReason.SHUTDOWN:
            return
        names = (model.id, model.name, f"{model.repo_id}@{model.commit}", *model.aliases)
        if reason is ChangeReason.UNLOAD and any(self.forcing[name] for name in names):
            self.forced.add(model.id)
            return
        workers = {worker.pid for worker in self._daemon.launcher.alive}
        if model.details is not None and model.details.worker_pid not in workers:
            self.problems.append(f"{model.id}: {reason} though its worker has died")
        if event.previous is not ModelState.READY:
            self.problems.append(f"{model.id}: {reason} of a model that is {event.previous}")
        if model.active_requests or model.active_leases:
            self.problems.append(
                f"{model.id}: {reason} with {model.active_requests} requests, "
                f"{model.active_leases} leases"
            )
        if reason is not ChangeReason.UNLOAD and model.keep_alive_s == PINNED:
            self.problems.append(f"{model.id}: {reason} though it is pinned")
        held = [each for each in self.leases.values() if each.model_id == model.id]
        if any(lease.expires > self._clock.now for lease in held):
            self.problems.append(f"{model.id}: {reason} though a client holds it")

    def holds(self, lease_id: str) -> bool:
        """Whether a lease that a client knows of holds a model that is there."""
        lease = self.leases.get(lease_id)
        alive = lease is not None and lease.expires > self._clock.now
        return lease is not None and alive and lease.model_id in self._states

    def check(self) -> None:
        """Looks at the daemon as it is now, after it has done all that is due.

        Raises:
            AssertionError: Something is wrong.
        """
        daemon = self._daemon
        daemon.book.check("a step")
        states = {view.id: view.state for view in daemon.registry.views()}
        if states != self._states:
            self.problems.append(f"models are {states}, and the events say {self._states}")
        self._check_leases()
        problems = [*self.problems, *daemon.book.problems, *daemon.hardware.overcommitted]
        assert not problems, problems

    def _check_leases(self) -> None:
        """A model that a client holds is there, unless it was ended by force or had failed."""
        for lease_id, lease in list(self.leases.items()):
            if lease.expires <= self._clock.now:
                del self.leases[lease_id]
            elif lease.model_id not in self._states:
                if lease.model_id not in self.forced | self._failed:
                    self.problems.append(f"{lease.model_id}: gone though a client holds it")
                del self.leases[lease_id]

    def rest(self) -> Rest:
        """What there is of a daemon that holds nothing."""
        daemon = self._daemon
        book, cards = daemon.book, daemon.hardware.cards
        return Rest(
            missing={card.id: self._missing(card) for card in cards},
            reserved=[holder for card in cards for holder in book.holders(card.id)],
            workers=len(daemon.launcher.alive),
            tasks=Counter(_work_of(task) for task in asyncio.all_tasks(self._loop)),
            pins=dict(daemon.store.pins.all()),
            leases=len(daemon.registry.leases._leases),
            flights=len(daemon.loads._flights.flights),
            expected=len(daemon.launcher.expected),
            health=sum(map(is_model_id, daemon.health.servicer._server_status)),  # type: ignore[attr-defined]
        )

    def _missing(self, card: Card) -> int:
        book, hardware = self._daemon.book, self._daemon.hardware
        missing = min(hardware.free(card.id), card.total_bytes) - book.available(card.id)
        return max(missing - book.untold(hardware.pool(card.id)), 0)


def _work_of(task: asyncio.Task[object]) -> str:
    """The name of what a task does."""
    return str(getattr(task.get_coro(), "__qualname__", task))
