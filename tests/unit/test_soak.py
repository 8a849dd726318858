"""What the soak makes of what it sees; that it sees a real daemon's is seen by running it."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from benchmarks.soak.footprint import Figure
from benchmarks.soak.load import Load
from benchmarks.soak.requests import Leaving, draw
from benchmarks.soak.route import Route
from loaderd.client import AsyncClient, errors
from tests.fake_daemon import FakeDaemon


def test_a_seed_draws_the_same_requests_again_and_another_one_others() -> None:
    first, again, other = ([draw(Random(seed)) for _ in range(20)] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_kind_of_request_is_drawn() -> None:
    random = Random(0)
    requests = [draw(random) for _ in range(2000)]
    assert {request.leaving for request in requests} == set(Leaving)
    assert {request.streams for request in requests} == {True, False}
    assert {key for request in requests for key in request.prompt} == {
        "text",
        "messages",
        "token_ids",
    }
    assert any(request.is_bad for request in requests)
    assert any(request.completions > 1 for request in requests)


@pytest.mark.parametrize(
    ("figure", "leaks"),
    [
        (Figure("files", 8, 8), False),
        (Figure("files", 8, 7), False),
        (Figure("files", 8, 9), True),
        (Figure("files", 8, 10, spare=2), False),
        (Figure("files", 8, 11, spare=2), True),
        (Figure("slots", 64, 64, exactly=True), False),
        (Figure("slots", 64, 63, exactly=True), True),
    ],
)
def test_what_is_left_or_missing_is_a_leak(figure: Figure, leaks: bool) -> None:
    assert figure.leaks is leaks


async def test_answers_that_ought_not_to_come_are_defects() -> None:
    with FakeDaemon() as daemon:
        async with AsyncClient(daemon.address) as client:
            model = await client.load("demo/chat")
            await model.unload()
            outcomes = await Load(client, model, seed=0).run(60, at_once=10)
    assert "a result" not in outcomes.ended
    assert sum(outcomes.defects.values()) > 30
    assert all(defect.startswith("ModelNotLoadedError") for defect in outcomes.defects)


async def test_a_route_that_is_cut_ends_the_call_and_the_next_one_finds_its_way() -> None:
    with FakeDaemon() as daemon:
        async with Route.to(daemon.address) as (route, address), AsyncClient(address) as client:
            watch = client.watch()
            await anext(watch)
            route.cut()
            with pytest.raises(errors.DaemonUnreachableError):
                await anext(watch)
            async with asyncio.timeout(30):
                while not await reaches(client):
                    await asyncio.sleep(0.05)


async def reaches(client: AsyncClient) -> bool:
    try:
        await client.info()
    except errors.DaemonUnreachableError:
        return False
    return True
