from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loaderd.server.worker.engine.batching.scheduler import Capacity, Scheduler, Ticket

CAPACITY = Capacity(slots=4, slot_tokens=60, tokens=120, queue=6)


def ticket(key: int, **fields: object) -> Ticket:
    given: dict[str, object] = {
        "client": "a",
        "priority": 0,
        "arrived": float(key),
        "prompt_tokens": 10,
        "new_tokens": 10,
        "completions": 1,
    }
    return Ticket(key=key, **(given | fields))  # type: ignore[arg-type]


def admitted(scheduler: Scheduler) -> list[int]:
    return [key for key, _ in scheduler.admit()]


def test_requests_of_one_client_run_in_the_order_of_their_arrival() -> None:
    scheduler = Scheduler(CAPACITY)
    for key in range(4):
        scheduler.submit(ticket(key))
    assert scheduler.order() == [0, 1, 2, 3]
    assert admitted(scheduler) == [0, 1, 2, 3]


def test_a_higher_priority_goes_first_but_not_for_ever() -> None:
    scheduler = Scheduler(CAPACITY)
    scheduler.submit(ticket(0, arrived=0.0))
    scheduler.submit(ticket(1, arrived=1.0, priority=1))
    scheduler.submit(ticket(2, arrived=100.0, priority=1))
    assert scheduler.order() == [1, 0, 2]


def test_whoever_asks_for_much_leaves_room_for_others() -> None:
    scheduler = Scheduler(CAPACITY)
    for key in range(4):
        scheduler.submit(ticket(key, client="greedy", arrived=0.0))
    scheduler.submit(ticket(9, client="modest", arrived=0.001))
    assert scheduler.order() == [0, 9, 1, 2, 3]


def test_what_is_withdrawn_delays_nothing() -> None:
    scheduler = Scheduler(Capacity(slots=1, slot_tokens=10_000, tokens=10_000, queue=300))
    for key in range(200):
        scheduler.submit(ticket(key, client="a", new_tokens=4000, arrived=1.0))
    for key in range(200):
        assert scheduler.withdraw(key)
    scheduler.submit(ticket(500, client="a", arrived=2.0))
    scheduler.submit(ticket(501, client="b", arrived=3.0))
    assert scheduler.order() == [500, 501]


def test_one_request_delays_its_client_by_some_seconds_at_most() -> None:
    scheduler = Scheduler(Capacity(slots=1, slot_tokens=10**6, tokens=10**6, queue=10))
    scheduler.submit(ticket(0, client="a", new_tokens=900_000, arrived=0.0))
    scheduler.submit(ticket(1, client="a", arrived=0.0))
    scheduler.submit(ticket(2, client="b", arrived=20.0))
    assert scheduler.order() == [0, 1, 2]


def test_the_first_is_not_passed_by_those_that_need_less() -> None:
    scheduler = Scheduler(CAPACITY)
    scheduler.submit(ticket(0, prompt_tokens=50))
    scheduler.submit(ticket(1, prompt_tokens=50))
    scheduler.submit(ticket(2, prompt_tokens=1, new_tokens=1))
    assert admitted(scheduler) == [0, 1]
    assert scheduler.order() == [2]
    scheduler = Scheduler(CAPACITY)
    scheduler.submit(ticket(0, prompt_tokens=50))
    scheduler.submit(ticket(1, completions=4))
    scheduler.submit(ticket(2, prompt_tokens=1, new_tokens=1))
    assert admitted(scheduler) == [0]
    scheduler.end(0)
    assert admitted(scheduler) == [1]


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"prompt_tokens": 50}, True),
        ({"prompt_tokens": 51}, False),
        ({"completions": 4}, True),
        ({"completions": 5, "prompt_tokens": 1, "new_tokens": 1}, False),
        ({"completions": 3, "prompt_tokens": 31}, False),
    ],
)
def test_what_can_never_run_is_known_before(fields: dict[str, object], fits: bool) -> None:
    assert Scheduler(CAPACITY).can_ever_run(ticket(0, **fields)) is fits


def test_half_of_a_step_is_for_the_oldest_prompt_and_half_for_the_shortest() -> None:
    scheduler = Scheduler(CAPACITY)
    for key, tokens in ((0, 40), (1, 30), (2, 4)):
        scheduler.submit(ticket(key, prompt_tokens=tokens, new_tokens=1))
    assert admitted(scheduler) == [0, 1, 2]
    counts = {piece.key: piece.count for piece in scheduler.pieces(20)}
    assert counts == {0: 10, 2: 4, 1: 6}
    scheduler.computed(0, 38)
    assert {piece.key: piece.count for piece in scheduler.pieces(20)} == {0: 2, 2: 4, 1: 14}


def test_a_hole_is_closed_only_when_nobody_waits() -> None:
    scheduler = Scheduler(Capacity(slots=3, slot_tokens=20, tokens=60, queue=6))
    for key in range(4):
        scheduler.submit(ticket(key))
    assert admitted(scheduler) == [0, 1, 2]
    scheduler.end(0)
    assert scheduler.move() is None
    assert list(scheduler.admit()) == [(3, (0,))]
    scheduler.end(1)
    assert scheduler.move() == (2, 1)
    assert scheduler.move() is None


@dataclass
class Model:
    """What ought to be, more simply."""

    waiting: set[int] = field(default_factory=set)
    running: dict[int, Ticket] = field(default_factory=dict)
    slots: dict[int, list[int]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)


class Any(RuleBasedStateMachine):
    """Whatever happens in whatever order: no slot leaks, and the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CAPACITY)
        self.model = Model()
        self.tickets: dict[int, Ticket] = {}

    @rule(
        client=st.sampled_from("abc"),
        priority=st.integers(-(2**31), 2**31 - 1),
        prompt=st.integers(1, 60),
        new=st.integers(1, 60),
        completions=st.integers(1, 5),
    )
    def submit(self, client: str, priority: int, prompt: int, new: int, completions: int) -> None:
        key = len(self.tickets)
        new_ticket = ticket(
            key,
            client=client,
            priority=priority,
            prompt_tokens=prompt,
            new_tokens=new,
            completions=completions,
        )
        self.tickets[key] = new_ticket
        if self.scheduler.can_ever_run(new_ticket) and not self.scheduler.is_full:
            self.scheduler.submit(new_ticket)
            self.model.waiting.add(key)

    @rule(key=st.integers(0, 50))
    def withdraw(self, key: int) -> None:
        assert self.scheduler.withdraw(key) == (key in self.model.waiting)
        self.model.waiting.discard(key)

    @rule()
    def admit(self) -> None:
        for key, slots in self.scheduler.admit():
            self.model.waiting.remove(key)
            self.model.running[key] = self.tickets[key]
            self.model.slots[key] = list(slots)
            self.model.computed[key] = 0
            assert len(slots) == self.tickets[key].completions

    @rule(budget=st.integers(1, 40))
    def compute(self, budget: int) -> None:
        pieces = self.scheduler.pieces(budget)
        unfinished = {
            key
            for key, running in self.model.running.items()
            if self.model.computed[key] < running.prompt_tokens
        }
        assert bool(pieces) == bool(unfinished)
        assert sum(piece.count for piece in pieces) <= budget
        assert len({piece.key for piece in pieces}) == len(pieces)
        if unfinished:
            assert min(unfinished, key=list(self.model.running).index) in {p.key for p in pieces}
        for piece in pieces:
            assert piece.count > 0
            end = self.model.computed[piece.key] + piece.count
            assert end <= self.model.running[piece.key].prompt_tokens
            self.scheduler.computed(piece.key, end)
            self.model.computed[piece.key] = end

    @precondition(lambda self: self.model.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.running)))
        slot = data.draw(st.sampled_from(self.model.slots[key]))
        self.scheduler.release(key, slot)
        self.model.slots[key].remove(slot)
        if not self.model.slots[key]:
            del self.model.running[key], self.model.slots[key]

    @precondition(lambda self: self.model.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.running)))
        self.scheduler.end(key)
        del self.model.running[key], self.model.slots[key]

    @rule()
    def move(self) -> None:
        used = sorted(slot for slots in self.model.slots.values() for slot in slots)
        move = self.scheduler.move()
        dense = used == list(range(len(used)))
        assert (move is None) == (dense or bool(self.model.waiting))
        if move is not None:
            source, target = move
            assert source == used[-1]
            assert target == min(set(range(CAPACITY.slots)) - set(used))
            for slots in self.model.slots.values():
                slots[:] = [target if slot == source else slot for slot in slots]

    @invariant()
    def limits_hold(self) -> None:
        used = [slot for slots in self.model.slots.values() for slot in slots]
        assert len(set(used)) == len(used) <= CAPACITY.slots
        reserved = sum(
            len(slots) * self.model.running[key].slot_tokens
            for key, slots in self.model.slots.items()
        )
        assert reserved <= CAPACITY.tokens
        assert set(self.scheduler.order()) == self.model.waiting
        assert self.scheduler.waiting == len(self.model.waiting) <= CAPACITY.queue

    def teardown(self) -> None:
        """Everybody gets a turn, and in the end all is free again."""
        for _ in range(len(self.tickets) + 1):
            self.admit()
            for key in list(self.model.running):
                self.scheduler.end(key)
                del self.model.running[key], self.model.slots[key]
        assert not self.model.waiting
        self.scheduler.submit(ticket(999, completions=4, new_tokens=20, arrived=999.0))
        assert list(self.scheduler.admit()) == [(999, (0, 1, 2, 3))]


TestAnyOrder = Any.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)


@settings(max_examples=50)
@given(priority=st.integers(-(2**31), 2**31 - 1), rate=st.integers(1, 3))
def test_none_starves_behind_a_stream_of_others(priority: int, rate: int) -> None:
    scheduler = Scheduler(Capacity(slots=1, slot_tokens=20, tokens=20, queue=10**6))
    scheduler.submit(ticket(0, client="victim", priority=priority, arrived=0.0))
    key = 0
    for second in range(2000):
        for _ in range(rate):
            key += 1
            fields = {"client": f"other{key}", "priority": 2**31 - 1, "arrived": float(second)}
            scheduler.submit(ticket(key, **fields))
        for running, _ in list(scheduler.admit()):
            if running == 0:
                return
            scheduler.end(running)
    raise AssertionError("it never ran")
