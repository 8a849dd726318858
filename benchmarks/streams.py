"""`python -m benchmarks.streams`: a load of concurrent streams through the SDK."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figures, StreamTimes, medians, summarize
from benchmarks.prompts import Prompts
from loaderd.client import AsyncClient, AsyncModel, LoaderdError
from loaderd.client.parameters import GenerationParameters
from tests.daemon import SpawnedDaemon

MODEL = Path(".cache/models/SmolLM2-135M-Instruct").absolute()
GREEDY = GenerationParameters(do_sample=False)
SAMPLED = GenerationParameters(do_sample=True, temperature=0.8, top_p=0.95)

_WARM_UP_STREAMS = 64
_WARM_UP_TOKENS = 4

Read = Callable[[str, int], Awaitable[StreamTimes]]
"""Sends a prompt, wants this many new tokens, and reads the stream to its end."""


class SdkReader:
    """Reads streams of one model through the SDK.

    Args:
        model: The model.
        parameters: Sent with each request.
    """

    def __init__(self, model: AsyncModel, parameters: GenerationParameters = GREEDY) -> None:
        self._model = model
        self._parameters = parameters

    async def __call__(self, prompt: str, tokens: int) -> StreamTimes:
        """See `Read`."""
        parameters = self._parameters.copy()
        parameters["max_new_tokens"] = tokens
        parameters["ignore_eos"] = True
        times = StreamTimes()
        try:
            stream = self._model.stream(prompt, **parameters)
            async for _ in stream:
                times.arrive()
            times.tokens = stream.result.usage.generated_tokens
        except LoaderdError as error:
            times.error = type(error).__name__
        return times


async def run_load(read: Read, prompts: Sequence[str], tokens: int) -> Figures:
    """One stream for each prompt, all at the same time; one with other tokens has failed."""
    streams = await asyncio.gather(*(read(prompt, tokens) for prompt in prompts))
    for stream in streams:
        if not stream.error and stream.tokens != tokens:
            stream.error = f"{stream.tokens} tokens instead of {tokens}"
    return summarize(streams)


async def warm_up(read: Read, prompts: Sequence[str]) -> None:
    """Lets the server make what it makes when this many streams come for the first time.

    Raises:
        RuntimeError: A stream failed.
    """
    figures = await run_load(read, prompts, _WARM_UP_TOKENS)
    if figures.errors:
        raise RuntimeError(f"streams failed: {figures.errors}")


def table_of(title: str, rows: Sequence[tuple[str, Figures]]) -> Table:
    """The figures as people read them."""
    heads = ("streams", "tokens/s", "first token, ms", "inter-token, ms", "errors")
    table = Table("", *heads, title=f"{title}; times: p50 / p99")
    for name, row in rows:
        table.add_row(
            name,
            str(row.streams),
            f"{row.tokens_per_second:.1f}",
            f"{1000 * row.first_token_p50:.0f} / {1000 * row.first_token_p99:.0f}",
            f"{1000 * row.inter_token_p50:.0f} / {1000 * row.inter_token_p99:.0f}",
            ", ".join(f"{count} {error}" for error, count in row.errors.items()) or "0",
        )
    return table


@contextmanager
def spawned_daemon(
    model: Path, environment: Mapping[str, str] | None = None, *, arguments: Sequence[str] = ()
) -> Iterator[SpawnedDaemon]:
    """A daemon that may load this model and takes any number of requests."""
    arguments = ["--allow-local", str(model.parent), "--max-requests", "100000", *arguments]
    variables = {"LOADERD_LOG_LEVEL": "warning", **(environment or {})}
    with (
        tempfile.TemporaryDirectory() as folder,
        SpawnedDaemon(Path(folder), arguments, variables) as daemon,
    ):
        yield daemon


def integers(text: str) -> list[int]:
    """Numbers with commas between, as an option has them."""
    return [int(part) for part in text.split(",")]


async def _measure(options: argparse.Namespace) -> dict[int, Figures]:
    prompts = Prompts()
    figures = {}
    async with AsyncExitStack() as stack:
        address = options.address
        if address is None:
            address = stack.enter_context(spawned_daemon(Path(options.model))).address
        client = await stack.enter_async_context(AsyncClient(address))
        model = await client.load(options.model, dtype=options.dtype)
        read = SdkReader(model, SAMPLED if options.sampled else GREEDY)
        for streams in options.streams:
            await warm_up(read, prompts.take(min(streams, _WARM_UP_STREAMS)))
            rounds = [
                await run_load(read, prompts.take(streams), options.tokens)
                for _ in range(options.rounds)
            ]
            figures[streams] = medians(rounds)
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    parser.add_argument("--address", help="a running daemon (default: one for this run)")
    parser.add_argument("--model", default=str(MODEL), help=f"folder or name ({MODEL.name})")
    parser.add_argument("--dtype", help="such as bfloat16 (default: the daemon's choice)")
    parser.add_argument("--streams", type=integers, default=[1, 8, 32], help="loads (1,8,32)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream (64)")
    parser.add_argument("--rounds", type=int, default=3, help="of each load; medians count (3)")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95")
    parser.add_argument("--json", action="store_true", help="print JSON rather than a table")
    options = parser.parse_args()
    figures = asyncio.run(_measure(options))
    if options.json:
        print(json.dumps([each.as_json() for each in figures.values()]))
        return
    how = "sampled" if options.sampled else "greedy"
    title = f"{options.tokens} new tokens, {how}, median of {options.rounds}"
    rows = [(Path(options.model).name, each) for each in figures.values()]
    Console().print(table_of(title, rows))


if __name__ == "__main__":
    main()
