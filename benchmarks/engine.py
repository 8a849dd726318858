"""`python -m benchmarks.engine`: what the engine promises, each figure beside its bar."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.engine_alone import EngineAlone
from benchmarks.figures import Figures, StreamTimes, percentile
from benchmarks.prompts import Prompts
from benchmarks.streams import (
    GREEDY,
    MODEL,
    SAMPLED,
    SdkReader,
    integers,
    run_load,
    spawned_daemon,
    warm_up,
)
from loaderd.client import AsyncClient, AsyncModel
from loaderd.client.parameters import GenerationParameters
from loaderd.client.types import DtypeName

_DTYPE: DtypeName = "bfloat16"
_LONG_PROMPT_TOKENS = 4000
_PREFIX_TOKENS = 1000
_RUNNING_STREAMS = 8
_SETTLED_PIECES = 30


@dataclass(frozen=True)
class Check:
    """One figure and what it may be.

    Attributes:
        what: What is measured.
        value: A ratio.
        bar: What it is held against.
        at_most: Whether the bar is the most that it may be; else the least.
        details: The figures that the ratio is of.
    """

    what: str
    value: float
    bar: float
    at_most: bool
    details: str

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of its bar."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def measure_engine(
    model: Path, *, rounds: int = 3, tokens: int = 64, streams: Sequence[int] = (1, 8, 32)
) -> Table:
    """Takes all figures on one daemon, and on the engine alone beside it."""
    checks = asyncio.run(_measure(model, rounds, tokens, streams))
    title = f"The engine, {model.name}, {_DTYPE}, medians of {rounds}"
    table = Table("", "measured", "bar", "", "of", title=title)
    for check in checks:
        bar = f"{'at most' if check.at_most else 'at least'} {check.bar:g}"
        verdict = "holds" if check.holds else "MISSED"
        table.add_row(check.what, f"{check.value:.2f} x", bar, verdict, check.details)
    return table


async def _measure(model: Path, rounds: int, tokens: int, streams: Sequence[int]) -> list[Check]:
    most = max(streams)
    with spawned_daemon(model) as daemon, EngineAlone(model, _DTYPE) as alone:
        async with AsyncClient(daemon.address) as client:
            loaded = await client.load(str(model), dtype=_DTYPE)
            checks = _Checks(loaded, alone, rounds, tokens)
            await checks.warm_up(most)
            return [
                await checks.evenness(most),
                await checks.long_prompt(),
                await checks.shared_prefix(),
                await checks.sampling(most),
                *[await checks.overhead(count) for count in streams],
            ]


class _Checks:
    """The measurements.

    Args:
        model: In the daemon.
        alone: The same model without one.
        rounds: Of each measurement.
        tokens: New tokens of each stream.
    """

    def __init__(self, model: AsyncModel, alone: EngineAlone, rounds: int, tokens: int) -> None:
        self._model = model
        self._alone = alone
        self._rounds = range(rounds)
        self._tokens = tokens
        self._prompts = Prompts()

    async def warm_up(self, streams: int) -> None:
        """Lets both sides make what they make at first."""
        prompts = self._prompts.take(streams)
        await warm_up(SdkReader(self._model), prompts)
        self._alone.run(prompts, 4)

    async def evenness(self, streams: int) -> Check:
        """How far the time between tokens strays when many streams run."""
        loads = [await self._load(streams) for _ in self._rounds]
        p50 = statistics.median(load.inter_token_p50 for load in loads)
        p99 = statistics.median(load.inter_token_p99 for load in loads)
        what = f"inter-token p99 / p50, {streams} streams"
        return Check(what, p99 / p50, 2, at_most=True, details=_milliseconds(p99, p50))

    async def long_prompt(self) -> Check:
        """Streams that run while a long prompt comes: before it, and until its first token."""
        prompt = await self._token_ids(_LONG_PROMPT_TOKENS)
        before: list[float] = []
        meanwhile: list[float] = []
        for number in self._rounds:
            texts = self._prompts.take(_RUNNING_STREAMS)
            running = [_Running(self._model, text) for text in texts]
            await asyncio.gather(*(one.settle() for one in running))
            # Another first token each time, so that nothing is known from the round before.
            arrival = await self._first_token([number + 1000, *prompt[1:]])
            for one in running:
                times = await one.stop()
                for gap, end in zip(times.gaps, times.arrivals[1:], strict=True):
                    (before if end < arrival.sent else meanwhile).append(gap)
        p50, p99 = percentile(before, 50), percentile(meanwhile, 99)
        return Check(
            f"inter-token p99 of {_RUNNING_STREAMS} streams while a prompt of "
            f"{_LONG_PROMPT_TOKENS} tokens comes / their p50 before",
            p99 / p50,
            4,
            at_most=True,
            details=f"{_milliseconds(p99, p50)} (p50 meanwhile: "
            f"{1000 * percentile(meanwhile, 50):.0f} ms)",
        )

    async def shared_prefix(self) -> Check:
        """The first token of a prompt whose beginning is known."""
        prefix = await self._token_ids(_PREFIX_TOKENS)
        unknown: list[float] = []
        known: list[float] = []
        for number in self._rounds:
            begin = [number + 2000, *prefix[1:]]
            for seconds, end in ((unknown, prefix[100:110]), (known, prefix[200:210])):
                times = await self._first_token([*begin, *end])
                seconds.append(times.arrivals[0] - times.sent)
        first, second = statistics.median(unknown), statistics.median(known)
        what = f"time to first token, prefix of {_PREFIX_TOKENS} tokens: second / first request"
        return Check(what, second / first, 0.2, at_most=True, details=_milliseconds(second, first))

    async def sampling(self, streams: int) -> Check:
        """What drawing tokens costs."""
        sampled: list[float] = []
        greedy: list[float] = []
        for _ in self._rounds:
            for speeds, parameters in ((sampled, SAMPLED), (greedy, GREEDY)):
                speeds.append((await self._load(streams, parameters)).tokens_per_second)
        what = f"tokens/s, {streams} streams: sampled / greedy"
        return _speed_check(what, sampled, greedy, 0.85)

    async def overhead(self, streams: int) -> Check:
        """What daemon, gRPC and SDK cost."""
        through: list[float] = []
        direct: list[float] = []
        for _ in self._rounds:
            prompts = self._prompts.take(streams)
            load = await run_load(SdkReader(self._model), prompts, self._tokens)
            through.append(load.tokens_per_second)
            direct.append(self._alone.run(prompts, self._tokens).tokens_per_second)
        what = f"tokens/s, {streams} streams: SDK / the engine alone"
        return _speed_check(what, through, direct, 0.93)

    async def _load(self, streams: int, parameters: GenerationParameters = GREEDY) -> Figures:
        reader = SdkReader(self._model, parameters)
        return await run_load(reader, self._prompts.take(streams), self._tokens)

    async def _first_token(self, token_ids: Sequence[int]) -> StreamTimes:
        times = StreamTimes()
        options = GenerationParameters(do_sample=False, max_new_tokens=1, ignore_eos=True)
        async for _ in self._model.stream(token_ids=token_ids, **options):
            times.arrive()
        return times

    async def _token_ids(self, count: int) -> list[int]:
        """A text of so many tokens."""
        texts = Prompts()
        token_ids: list[int] = []
        while len(token_ids) < count:
            token_ids += (await self._model.tokenize(*texts.take(1))).token_ids
        return token_ids[:count]


class _Running:
    """A stream that goes on until it is stopped."""

    def __init__(self, model: AsyncModel, prompt: str) -> None:
        self._times = StreamTimes()
        self._settled = asyncio.Event()
        self._task = asyncio.create_task(self._read(model, prompt))

    async def settle(self) -> None:
        """Until it has run for a while."""
        settled = asyncio.create_task(self._settled.wait())
        await asyncio.wait([settled, self._task], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()

    async def stop(self) -> StreamTimes:
        """Ends it and says when its pieces came."""
        self._task.cancel()
        await asyncio.wait([self._task])
        return self._times

    async def _read(self, model: AsyncModel, prompt: str) -> None:
        options = GenerationParameters(do_sample=False, max_new_tokens=4000, ignore_eos=True)
        async for _ in model.stream(prompt, **options):
            self._times.arrive()
            if len(self._times.arrivals) == _SETTLED_PIECES:
                self._settled.set()


def _speed_check(what: str, ours: Sequence[float], other: Sequence[float], bar: float) -> Check:
    one, two = statistics.median(ours), statistics.median(other)
    return Check(what, one / two, bar, at_most=False, details=f"{one:.1f} and {two:.1f} tokens/s")


def _milliseconds(one: float, other: float) -> str:
    return f"{1000 * one:.0f} and {1000 * other:.0f} ms"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder ({MODEL.name})")
    parser.add_argument("--streams", type=integers, default=[1, 8, 32], help="loads (1,8,32)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream (64)")
    parser.add_argument("--rounds", type=int, default=3, help="medians of them count (3)")
    options = parser.parse_args()
    model = options.model.absolute()
    Console().print(
        measure_engine(model, rounds=options.rounds, tokens=options.tokens, streams=options.streams)
    )


if __name__ == "__main__":
    main()
