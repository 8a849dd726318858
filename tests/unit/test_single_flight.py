import asyncio
from collections.abc import Callable

import pytest

from loaderd.server.single_flight import SingleFlight


async def test_waiters_share_one_piece_of_work() -> None:
    flights: SingleFlight[str, int, str] = SingleFlight()
    starts = 0

    async def work(publish: Callable[[int], None]) -> str:
        nonlocal starts
        starts += 1
        for step in range(3):
            publish(step)
            await asyncio.sleep(0)
        return "done"

    async def wait() -> tuple[list[int], str]:
        async with flights.join("key", work) as flight:
            seen = [step async for step in flight.progress()]
            return seen, await flight.result()

    results = await asyncio.gather(*(wait() for _ in range(5)))
    assert starts == 1
    assert {result for _, result in results} == {"done"}
    assert all(seen[-1] == 2 for seen, _ in results)


async def test_a_waiter_that_leaves_does_not_stop_the_others_and_the_last_one_does() -> None:
    flights: SingleFlight[str, int, str] = SingleFlight()
    release = asyncio.Event()
    cancelled = asyncio.Event()

    async def work(publish: Callable[[int], None]) -> str:
        try:
            await release.wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "done"

    async def wait() -> str:
        async with flights.join("key", work) as flight:
            return await flight.result()

    first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not cancelled.is_set()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert cancelled.is_set()

    release.set()
    assert await wait() == "done"


async def test_every_waiter_gets_the_error_and_the_next_one_starts_anew() -> None:
    flights: SingleFlight[str, int, str] = SingleFlight()
    attempts = 0

    async def work(publish: Callable[[int], None]) -> str:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0)
        if attempts == 1:
            raise OSError("first attempt")
        return "done"

    async def wait() -> str:
        async with flights.join("key", work) as flight:
            return await flight.result()

    outcomes = await asyncio.gather(wait(), wait(), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["first attempt", "first attempt"]
    assert await wait() == "done"


async def test_a_late_waiter_gets_the_latest_progress() -> None:
    flights: SingleFlight[str, int, str] = SingleFlight()
    published, release = asyncio.Event(), asyncio.Event()

    async def work(publish: Callable[[int], None]) -> str:
        publish(1)
        publish(2)
        published.set()
        await release.wait()
        return "done"

    async def first_progress() -> int:
        async with flights.join("key", work) as flight:
            async for value in flight.progress():
                release.set()
                await flight.result()
                return value
        raise AssertionError("no progress")

    async with flights.join("key", work) as flight:
        await published.wait()
        assert await first_progress() == 2
        assert await flight.result() == "done"


async def test_an_aborted_flight_gives_all_waiters_the_error_and_the_next_one_starts_anew() -> None:
    flights: SingleFlight[str, int, str] = SingleFlight()
    release = asyncio.Event()
    stopped = 0

    async def work(publish: Callable[[int], None]) -> str:
        nonlocal stopped
        publish(1)
        try:
            await release.wait()
        except asyncio.CancelledError:
            stopped += 1
            raise
        return "done"

    async def wait() -> str:
        async with flights.join("key", work) as flight:
            async for _ in flight.progress():
                pass
            return await flight.result()

    waiters = [asyncio.create_task(wait()) for _ in range(2)]
    await asyncio.sleep(0.01)
    (flight,) = flights.flights.values()
    assert (flight.waiters, flight.latest) == (2, 1)
    await flight.abort(OSError("stop"))
    assert stopped == 1
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["stop", "stop"]
    assert not flights.flights
    release.set()
    assert await wait() == "done"
