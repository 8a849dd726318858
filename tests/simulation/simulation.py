"""A simulated box in action: what clients and accidents do to it, step by step."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from contextlib import ExitStack
from random import Random
from types import TracebackType
from typing import Any

from loaderd.server.models.loads import OnDemand
from tests.simulation.clients import Clients
from tests.simulation.daemon import LOAD_TIMEOUT_S, SimulatedDaemon
from tests.simulation.hardware import INVENTORIES, Hardware
from tests.simulation.loop import Clock, SimulatedLoop
from tests.simulation.store import NAMES
from tests.simulation.watcher import Rest, Watcher
from tests.simulation.workers import Fate, SimulatedWorker

LONGEST_GRACE_S = 600.0
_STARTS_S = 30.0
_ENDS_S = 60.0
_SETTLES_S = LONGEST_GRACE_S + 20 * LOAD_TIMEOUT_S
"""Loads may wait for each other, for restarts and for a grace."""
_MOST_ROUNDS = 20
"""Of unloading or ending everything, after which nothing may have come back."""


class Simulation:
    """One daemon on one box. Every method is a step, after which everything is checked.

    Args:
        inventory: A key of `INVENTORIES`.
        seed: How long everything takes.
        standby: Number of spare workers.
        on_demand: What requests for text may load.

    Attributes:
        ended: How calls have ended, by what they did and how.
    """

    def __init__(
        self, inventory: str, seed: int, standby: int = 1, on_demand: OnDemand = OnDemand.OFF
    ) -> None:
        random = Random(seed)
        self._stack = ExitStack()
        self._clock = Clock()
        self._hardware = Hardware(INVENTORIES[inventory])
        self._loop = SimulatedLoop(self._clock, random)
        self._daemon = SimulatedDaemon(self._hardware, self._clock, random, standby, on_demand)
        self._events = 0
        self.ended: Counter[str] = Counter()

    def __enter__(self) -> Simulation:
        logging.disable(logging.CRITICAL)
        self._stack.callback(logging.disable, logging.NOTSET)
        self._stack.enter_context(self._daemon.disguised(self._clock))
        try:
            self._start()
            self._load_one()  # so that the daemon has all that it ever has
            self._before = self._rest_without_models()
            assert self._before.workers == self._daemon.standby, "workers after a load"
        except BaseException:
            self.close(comes_to_rest=False)
            raise
        self.ended.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(comes_to_rest=error is None)

    def close(self, *, comes_to_rest: bool) -> None:
        """Ends it, in good order unless something was wrong already.

        Raises:
            AssertionError: Something is left.
        """
        try:
            if comes_to_rest:
                self.come_to_rest()
                self._stop()
        finally:
            self._abandon()
            self._loop.close()
            self._stack.close()

    @property
    def clients(self) -> Clients:
        """Who calls; `step` lets the daemon answer."""
        return self._clients

    @property
    def models(self) -> list[str]:
        """Names and ids of the models that are there."""
        views = self._daemon.registry.views()
        return [text for view in views for text in (view.id, view.name)]

    @property
    def leases(self) -> list[str]:
        """Leases that clients hold."""
        return list(self._watcher.leases)

    @property
    def workers(self) -> list[SimulatedWorker]:
        """Workers that live, the oldest first."""
        return sorted(self._daemon.launcher.alive, key=lambda worker: worker.pid)

    @property
    def events(self) -> int:
        """How many changes of models there were."""
        return self._events + self._watcher.events

    def step(self, seconds: float = 0.0) -> None:
        """Lets time pass.

        Raises:
            AssertionError: Something is wrong.
        """
        self._loop.advance(seconds)
        self._watcher.check()
        assert not self._clients.problems, self._clients.problems

    def fate(self, fate: Fate) -> None:
        """From now on loads end so."""
        self._daemon.launcher.fate = fate
        self._trouble()

    def hub(self, is_away: bool) -> None:
        """The hub goes or comes back."""
        self._daemon.store.is_hub_away = is_away
        self._trouble()

    def kernel(self, is_slow: bool) -> None:
        """The kernel keeps processes for long that were killed, or does not."""
        self._daemon.launcher.sticks = is_slow
        self._trouble()

    def delete(self) -> None:
        """Somebody deletes from the cache what nobody uses."""
        self._daemon.store.delete()

    def crash(self, index: int) -> None:
        """A worker dies."""
        if workers := self.workers:
            self._trouble()
            self._loop.call_soon(workers[index % len(workers)].crash)

    def hang(self, index: int) -> None:
        """A worker lives on without a sign."""
        if workers := self.workers:
            self._trouble()
            self._loop.call_soon(workers[index % len(workers)].hang)

    def restart(self, patience_s: float) -> None:
        """The daemon is told to stop, with calls under way, and another one comes."""
        self._stop(patience_s)
        self._start()

    def come_to_rest(self) -> None:
        """Heals the box, lets all calls end, unloads everything, and looks for what is left.

        Raises:
            AssertionError: A call has not ended, or something is left.
        """
        self._heal()
        self.step(_SETTLES_S)
        waiting = Counter(call.kind for call in self._clients.running)
        assert not waiting, f"calls that never end: {waiting}"
        self._clients.in_trouble = False
        rest = self._rest_without_models()
        assert rest == self._before, f"{rest} and not {self._before}"

    def _load_one(self) -> None:
        self._clients.load(NAMES[0])
        self.step(LOAD_TIMEOUT_S)

    def _unload_all(self) -> None:
        for _ in range(_MOST_ROUNDS):
            views = self._daemon.registry.views()
            if not views:
                break
            for view in views:
                self._clients.unload(view.id, force=True)
            self.step(_STARTS_S)

    def _rest_without_models(self) -> Rest:
        """Unloads everything; what there is then."""
        self._unload_all()
        self._wait(self._daemon.planner.devices())
        if self._daemon.standby == 0 and self.workers:
            self._load_one()  # the worker that has looked at the devices is that of the next load
            self._unload_all()
        self.step(_STARTS_S)
        return self._watcher.rest()

    def _trouble(self) -> None:
        self._clients.trouble()

    def _abandon(self) -> None:
        """Ends whatever is left, which may start something else when it ends."""
        for _ in range(_MOST_ROUNDS):
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.advance(_ENDS_S)

    def _heal(self) -> None:
        self._daemon.launcher.fate = Fate.WELL
        self._daemon.launcher.sticks = False
        self._daemon.store.is_hub_away = False

    def _start(self) -> None:
        daemon, loop = self._daemon, self._loop
        self._wait(daemon.start())
        looking = loop.create_task(daemon.planner.devices())  # by the first client, at once
        self._watcher = Watcher(daemon, self._clock, loop)
        self._clients = Clients(daemon, self._watcher, loop, self._clock)
        self._clients.ended = self.ended
        self._following = loop.create_task(self._watcher.follow())
        self.step(_STARTS_S)
        looking.result()
        assert len(daemon.launcher.alive) == max(daemon.standby, 1), "workers before any load"

    def _stop(self, patience_s: float = 0.0) -> None:
        """Ends the daemon.

        Raises:
            AssertionError: Something of it is left.
        """
        self._heal()
        self._events += self._watcher.events
        self._wait(self._daemon.stop(patience_s))
        self._loop.advance(_ENDS_S)
        waiting = Counter(call.kind for call in self._clients.running)
        assert not waiting, f"calls that outlive the daemon: {waiting}"
        assert not self._clients.problems, self._clients.problems
        tasks = [str(task.get_coro()) for task in asyncio.all_tasks(self._loop)]
        assert not tasks, f"tasks that outlive the daemon: {tasks}"
        assert not self._daemon.launcher.alive, "workers outlive the daemon"
        assert not self._daemon.store.pins.all(), "snapshots are in use without a daemon"

    def _wait(self, work: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(work)
        self._loop.advance()
        while not task.done():
            self._loop.advance(_STARTS_S)
        task.result()
