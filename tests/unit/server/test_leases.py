"""Leases and keep-alives, by a clock of the test's."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaderd.server.errors import InvalidArgumentError, LeaseNotFoundError
from loaderd.server.models.keep_alive import PINNED, KeepAlive
from loaderd.server.models.leases import Lease, Leases


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class LeaseMachine(RuleBasedStateMachine):
    """Leases beside a table of who must be there until when."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.leases = Leases(self.clock, lambda: None, lambda _model, _when: None)
        self.ends: dict[str, float] = {}
        self.known: list[Lease] = []

    @rule(model=st.sampled_from("ab"), ttl=st.floats(1, 100))
    def acquire(self, model: str, ttl: float) -> None:
        lease = self.leases.acquire(model, ttl)
        self.known.append(lease)
        self.ends[lease.id] = self.clock.now + ttl

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.ends = {name: end for name, end in self.ends.items() if end > self.clock.now}

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        if self.known:
            lease = data.draw(st.sampled_from(self.known))
            if lease.id in self.ends:
                self.leases.renew(lease.id)
                self.ends[lease.id] = self.clock.now + lease.ttl_s
            else:
                with pytest.raises(LeaseNotFoundError):
                    self.leases.renew(lease.id)

    @rule(data=st.data(), seconds=st.floats(0, 300))
    def use(self, data: st.DataObject, seconds: float) -> None:
        """However long a request takes, its lease does not end before it."""
        alive = [lease for lease in self.known if lease.id in self.ends]
        if alive:
            lease = data.draw(st.sampled_from(alive))
            with self.leases.use(lease.id, lease.model_id):
                self.wait(seconds)
                assert lease in self.leases.of(lease.model_id)
            self.ends[lease.id] = self.clock.now + lease.ttl_s

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.known:
            lease = data.draw(st.sampled_from(self.known))
            if self.ends.pop(lease.id, None) is not None:
                self.leases.release(lease.id)
            with pytest.raises(LeaseNotFoundError):
                self.leases.release(lease.id)

    @rule(model=st.sampled_from("ab"))
    def drop(self, model: str) -> None:
        self.leases.drop(model)
        for lease in self.known:
            if lease.model_id == model:
                self.ends.pop(lease.id, None)

    @invariant()
    def those_that_live_hold_their_models(self) -> None:
        holding = [lease for model in "ab" for lease in self.leases.of(model)]
        assert {lease.id for lease in holding} == self.ends.keys()


TestLeases = LeaseMachine.TestCase


@pytest.mark.parametrize("ttl", [-1, 0, 0.5, 24 * 3600 + 1, math.nan, math.inf])
def test_a_lease_that_is_too_short_or_too_long_is_refused(ttl: float) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Leases(Clock(), lambda: None, lambda _model, _when: None).acquire("a", ttl)
    assert caught.value.field == "ttl"


def test_a_lease_of_another_model_is_none() -> None:
    leases = Leases(Clock(), lambda: None, lambda _model, _when: None)
    lease = leases.acquire("a", 10)
    with pytest.raises(LeaseNotFoundError), leases.use(lease.id, "b"):
        pass
    assert leases.of("a") == [lease]


def test_a_keep_alive_counts_from_the_last_use() -> None:
    clock = Clock()
    keep_alive = KeepAlive(10, clock)
    assert keep_alive.expiry() == math.inf, "it is not READY yet"
    keep_alive.ready()
    assert keep_alive.expiry() == 110
    clock.now = 107
    keep_alive.used()
    assert (keep_alive.expiry(), keep_alive.last_used) == (117, 107)
    keep_alive.seconds = PINNED
    assert keep_alive.expiry() == math.inf


def test_a_model_without_keep_alive_waits_for_its_first_use() -> None:
    clock = Clock()
    keep_alive = KeepAlive(0, clock)
    keep_alive.ready()
    assert 160 < keep_alive.expiry() < math.inf
    clock.now = 107
    keep_alive.used()
    assert keep_alive.expiry() == 107
