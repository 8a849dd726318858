"""Whatever clients do and whatever happens to workers, in any order: a daemon keeps its promises.

What they are is in `watcher.py`, and in `Simulation.come_to_rest`, which ends every run.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loaderd.server.models.loads import OnDemand
from tests.simulation.accidents import Accidents
from tests.simulation.hardware import INVENTORIES
from tests.simulation.simulation import LONGEST_GRACE_S, Simulation
from tests.simulation.store import NAMES
from tests.simulation.workers import Fate

names = st.sampled_from(NAMES)
indices = st.integers(0, 9)
keep_alives = st.sampled_from([None, 0, 0.001, 30, -1])
device_maps = st.sampled_from([None, "balanced", "cpu", "cuda:0", "cuda:1"])
ttls = st.sampled_from([1, 10, 100])
graces = st.sampled_from([0, 1, LONGEST_GRACE_S])


class AnyOrder(RuleBasedStateMachine):
    """One box; every rule is one thing that happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self._box: Simulation | None = None
        self._is_sound = True

    @initialize(
        inventory=st.sampled_from(sorted(INVENTORIES)),
        seed=st.integers(0, 1000),
        standby=st.integers(0, 2),
        on_demand=st.sampled_from(OnDemand),
    )
    def start(self, inventory: str, seed: int, standby: int, on_demand: OnDemand) -> None:
        self._box = Simulation(inventory, seed, standby, on_demand).__enter__()

    @property
    def box(self) -> Simulation:
        assert self._box is not None
        return self._box

    def _model(self, name: str, index: int | None) -> str:
        """A model that is there, or the name."""
        models = self.box.models
        return models[index % len(models)] if models and index is not None else name

    def _step(self, seconds: float = 0.0) -> None:
        self._is_sound = False
        self.box.step(seconds)
        self._is_sound = True

    @rule(name=names, device_map=device_maps, keep_alive=keep_alives, ttl=st.none() | ttls)
    def load(
        self, name: str, device_map: str | None, keep_alive: float | None, ttl: float | None
    ) -> None:
        self.box.clients.load(name, device_map, keep_alive, ttl)
        self._step()

    @rule(
        name=names,
        index=st.none() | indices,
        count=st.sampled_from([0, 5, 1000]),
        keep_alive=keep_alives,
        lease=st.none() | indices,
    )
    def generate(
        self, name: str, index: int | None, count: int, keep_alive: float | None, lease: int | None
    ) -> None:
        leases = self.box.leases
        lease_id = leases[lease % len(leases)] if leases and lease is not None else None
        self.box.clients.generate(self._model(name, index), count, keep_alive, lease_id)
        self._step()

    @precondition(lambda self: self.box.clients.running)
    @rule(index=indices)
    def cancel(self, index: int) -> None:
        self.box.clients.cancel(index)
        self._step()

    @rule(name=names, index=st.none() | indices, grace=st.none() | graces)
    def unload(self, name: str, index: int | None, grace: float | None) -> None:
        model = self._model(name, index)
        self.box.clients.unload(model, force=grace is not None, grace=grace or 0.0)
        self._step()

    @rule(name=names, index=indices, ttl=ttls)
    def acquire(self, name: str, index: int, ttl: float) -> None:
        self.box.clients.acquire(self._model(name, index), ttl)
        self._step()

    @precondition(lambda self: self.box.leases)
    @rule(index=indices, releases=st.booleans())
    def renew_or_release(self, index: int, releases: bool) -> None:
        lease_id = self.box.leases[index % len(self.box.leases)]
        (self.box.clients.release if releases else self.box.clients.renew)(lease_id)
        self._step()

    @rule(seconds=st.sampled_from([0.05, 1, 5, 30, 400]))
    def time_passes(self, seconds: float) -> None:
        self._step(seconds)

    @precondition(lambda self: self.box.workers)
    @rule(index=indices, hangs=st.booleans())
    def worker_dies_or_hangs(self, index: int, hangs: bool) -> None:
        (self.box.hang if hangs else self.box.crash)(index)
        self._step()

    @rule(fate=st.sampled_from(Fate))
    def loads_end(self, fate: Fate) -> None:
        self.box.fate(fate)

    @rule(is_slow=st.booleans())
    def kernel(self, is_slow: bool) -> None:
        self.box.kernel(is_slow)

    @rule(is_away=st.booleans())
    def hub(self, is_away: bool) -> None:
        self.box.hub(is_away)

    @rule()
    def files_are_deleted(self) -> None:
        self.box.delete()

    def teardown(self) -> None:
        if self._box is not None:
            self._box.close(comes_to_rest=self._is_sound)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("inventory", sorted(INVENTORIES))
def test_a_long_run(inventory: str) -> None:
    with Simulation(inventory, seed=7, on_demand=OnDemand.CACHED) as box:
        accidents = Accidents(box, seed=7)
        for _ in range(300):
            accidents.happen()
    assert box.events > 100
    assert {"load: done", "generate: done", "unload: done"} <= set(box.ended)


def test_a_seed_is_the_same_run_again() -> None:
    def run(seed: int) -> object:
        with Simulation("mixed cards", seed) as box:
            accidents = Accidents(box, seed)
            for _ in range(100):
                accidents.happen()
        return box.events, box.ended

    assert run(3) == run(3)
    assert run(3) != run(4)
