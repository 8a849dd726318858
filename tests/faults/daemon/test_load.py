"""More at once than a model can serve, and more over time than leaks would let pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.soak.soak import soak
from loaderd.client import AsyncClient, AsyncModel, GenerationParameters, errors
from tests.daemon import SpawnedDaemon

AT_ONCE = 1000
UNARY = 10
"""Each of so many is no stream."""
TOKENS = 8
QUEUE = 256
"""What a daemon takes by default, running and waiting."""
MORE = 100
"""Asked while the queue is full: few enough to be answered before it moves."""

MIB = 2**20
GROWTH_MIB = {"daemon": 96, "worker": 192}
"""What the first thousand may leave in memory, such as pools and arenas."""
MORE_MIB = 96
"""What the second thousand may add to that."""


@contextmanager
def running(folder: Path, model: Path, *arguments: str) -> Iterator[SpawnedDaemon]:
    roots = ("--allow-local", str(model.parent))
    with SpawnedDaemon(folder, (*roots, "--standby", "0", *arguments)) as daemon:
        yield daemon


async def ask(model: AsyncModel, number: int) -> int:
    """Tokens that came in the answer; also those of a stream are counted as they come."""
    options = GenerationParameters(max_new_tokens=TOKENS, ignore_eos=True, return_token_ids=True)
    if number % UNARY == 0:
        return len((await model.generate(f"{number}", **options)).token_ids)
    stream = model.stream(f"{number}", **options)
    tokens = 0
    try:
        async for delta in stream:
            tokens += len(delta.token_ids)
    except errors.QueueFullError:
        assert stream.started is None
        raise
    return tokens


def memory(daemon: SpawnedDaemon) -> dict[str, int]:
    (worker,) = daemon.workers()
    processes = {"daemon": psutil.Process(daemon.process.pid), "worker": worker}
    return {name: each.memory_info().rss // MIB for name, each in processes.items()}


async def until_idle(model: AsyncModel) -> None:
    async with asyncio.timeout(30):
        while (await model.refresh()).active_requests:
            await asyncio.sleep(0.02)


async def test_a_thousand_streams_at_once_all_complete(tmp_path: Path, tiny_model: Path) -> None:
    with running(tmp_path, tiny_model, "--max-requests", "100000") as daemon:
        async with AsyncClient(daemon.address) as client:
            model = await client.load(str(tiny_model))
            sizes = [memory(daemon)]
            for _ in range(2):
                answers = await asyncio.gather(*(ask(model, each) for each in range(AT_ONCE)))
                assert answers == [TOKENS] * AT_ONCE
                await until_idle(model)
                sizes.append(memory(daemon))
    start, after, later = sizes
    for name, most in GROWTH_MIB.items():
        assert after[name] <= start[name] + most
        assert later[name] <= after[name] + MORE_MIB


async def test_what_a_full_queue_does_not_take_is_refused_at_once(
    tmp_path: Path, tiny_model: Path
) -> None:
    with running(tmp_path, tiny_model) as daemon:
        async with AsyncClient(daemon.address) as client:
            model = await client.load(str(tiny_model))
            answers = await gather_all(ask(model, each) for each in range(AT_ONCE))
            assert answers.count(TOKENS) >= QUEUE
            check_refusals([each for each in answers if each != TOKENS])
            await until_idle(model)

            waiting = [
                model.stream("The", max_new_tokens=240, ignore_eos=True) for _ in range(QUEUE)
            ]
            readers = [asyncio.create_task(anext(stream)) for stream in waiting]
            async with asyncio.timeout(60):
                while waiting[-1].queue_position is None:
                    await asyncio.sleep(0.02)
            refused = await gather_all(ask(model, each) for each in range(MORE))
            assert waiting[-1].queue_position is not None  # nobody had to wait for the others
            check_refusals(refused)
            for stream in waiting:
                stream.cancel()
            await asyncio.wait(readers)
            await until_idle(model)
            assert await ask(model, 1) == TOKENS


async def gather_all(calls: Iterable[Awaitable[int]]) -> list[int | BaseException]:
    return list(await asyncio.gather(*calls, return_exceptions=True))


def check_refusals(answers: Sequence[int | BaseException]) -> None:
    for error in answers:
        assert isinstance(error, errors.QueueFullError), error
        assert error.retry_after
        assert error.limit == QUEUE


async def test_a_soak_leaves_nothing_behind(tiny_model: Path) -> None:
    report = await soak(tiny_model, 400, warm_up=300, seed=1)
    assert not report.outcomes.defects
    assert report.outcomes.ended["a result"]
    assert [figure for figure in report.figures if figure.leaks] == []
    assert report.complaints == []
    assert report.exit_code == 0
