"""Which replica a request goes to, and which ones leave."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.models.replicas import MOST_REPLICAS, Replica, Replicas, check_replicas
from loaderd.server.supervisor.supervisor import LoadedWorker
from loaderd.worker.v1 import worker_pb2

counts = st.integers(1, 6)
steps = st.lists(st.tuples(st.sampled_from(["begin", "end", "scale"]), st.integers(0, 99)))


def some(count: int) -> Replicas:
    replicas = Replicas()
    for _ in range(count):
        add(replicas)
    replicas.wanted = count
    return replicas


def add(replicas: Replicas) -> Replica:
    link = SimpleNamespace(failed=False, queued=0, memory_bytes=0)
    worker = SimpleNamespace(pid=1, link=link)
    loaded = SimpleNamespace(worker=worker, loaded=worker_pb2.Loaded(), wait_s=0.0)
    return replicas.add(cast(LoadedWorker, loaded))


@given(counts, st.integers(1, 30))
def test_requests_that_stay_are_spread_evenly(count: int, requests: int) -> None:
    replicas = some(count)
    with ExitStack() as running:
        for _ in range(requests):
            running.enter_context(replicas.use(replicas.least_loaded()))
        loads = [replica.requests for replica in replicas.all]
        assert sum(loads) == requests
        assert max(loads) - min(loads) <= 1
        views = [replica.view() for replica in replicas.all]
        assert sum(view.running for view in views) == requests
    assert all(replica.quiet.is_set() and not replica.requests for replica in replicas.all)


@given(counts)
def test_requests_one_after_the_other_take_turns(count: int) -> None:
    replicas = some(count)
    turns = []
    for _ in range(2 * count):
        replica = replicas.least_loaded()
        turns.append(replica.number)
        with replicas.use(replica):
            pass
    assert turns == 2 * [replica.number for replica in replicas.all]


@given(counts)
def test_who_asks_again_comes_to_the_same_replica_unless_it_has_more_to_do(count: int) -> None:
    replicas = some(count)
    for asker in range(count):
        with replicas.use(replicas.least_loaded(f"client {asker}"), f"client {asker}"):
            pass
    homes = [replicas.least_loaded(f"client {asker}") for asker in range(count)]
    assert set(homes) == set(replicas.all)
    assert replicas.least_loaded("another client") is homes[0]
    with replicas.use(homes[-1], "another client"), replicas.use(homes[-1], f"client {count - 1}"):
        other = replicas.least_loaded(f"client {count - 1}")
        assert other is not homes[-1] or count == 1


@given(counts, steps)
def test_whoever_is_chosen_serves_and_none_has_less_to_do(
    count: int, steps: list[tuple[str, int]]
) -> None:
    replicas = some(count)
    running: list[ExitStack] = []
    for step, number in steps:
        if step == "begin":
            chosen = replicas.least_loaded()
            assert not chosen.leaving
            assert all(chosen.requests <= other.requests for other in replicas.serving)
            running.append(ExitStack())
            running[-1].enter_context(replicas.use(chosen))
        elif step == "end" and running:
            running.pop(number % len(running)).close()
        elif step == "scale":
            wanted = 1 + number % 6
            before = set(replicas.serving)
            replicas.recall(wanted)
            while len(replicas.serving) < wanted:
                add(replicas)
            replicas.wanted = wanted
            going = replicas.dismiss()
            assert len(replicas.serving) == wanted
            assert set(going) <= before
            stays = min((replica.requests for replica in replicas.serving), default=0)
            assert all(replica.requests <= stays for replica in going)
    assert sum(replica.requests for replica in replicas.all) == len(running)


def test_what_is_to_leave_comes_back_first_the_busiest_one() -> None:
    replicas = some(3)
    idle, busy, ending = replicas.all
    with replicas.use(busy):
        replicas.wanted = 1
        assert set(replicas.dismiss()) == {idle, ending}
        ending.ending = True
        busy.leaving = True
        replicas.recall(1)
        assert set(replicas.serving) == {busy}
        replicas.recall(3)
    assert set(replicas.serving) == {idle, busy}, "what is being ended is not kept"


@pytest.mark.parametrize("count", [0, -1, MOST_REPLICAS + 1])
def test_a_number_out_of_bounds_is_refused(count: int) -> None:
    with pytest.raises(InvalidArgumentError):
        check_replicas(count)
    assert check_replicas(1) == 1
