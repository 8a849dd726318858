"""Sends drawn requests through the SDK and says what came of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from benchmarks.soak.requests import Leaving, SoakRequest, draw
from benchmarks.soak.route import Route
from loaderd.client import AsyncClient, AsyncModel, FinishReason, GenerationResult, errors

_LONGEST_S = 120.0
"""Far longer than any request takes: one that lasts so long hangs."""
_RETRY_S = 0.5
"""After QueueFullError, sooner than it asks for: the queue is to stay full."""

_EXPECTED: dict[Leaving, type[errors.LoaderdError]] = {
    Leaving.CANCEL_STREAM: errors.CallCancelledError,
    Leaving.RUN_OUT_OF_TIME: errors.DeadlineError,
    Leaving.LOSE_CONNECTION: errors.DaemonUnreachableError,
}
"""What a client that leaves may get instead of a result."""


class DefectError(Exception):
    """A request that did not end as it ought to."""


@dataclass
class Outcomes:
    """How many requests came to what.

    Attributes:
        ended: Those that ended as they may.
        defects: The others.
    """

    ended: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)


class Load:
    """A stream of random requests to one model.

    Args:
        client: Its connection.
        model: The model.
        seed: Of the requests, not of their timing.
    """

    def __init__(self, client: AsyncClient, model: AsyncModel, seed: int) -> None:
        self._client = client
        self._model = model
        self._random = Random(seed)

    async def run(self, requests: int, at_once: int) -> Outcomes:
        """Sends so many requests, each as soon as fewer than `at_once` are under way."""
        outcomes = Outcomes()
        left = iter(range(requests))
        await asyncio.gather(*(self._send(left, outcomes) for _ in range(at_once)))
        return outcomes

    async def _send(self, left: Iterator[int], outcomes: Outcomes) -> None:
        for _ in left:
            request = draw(self._random)
            try:
                outcome = await self._outcome(request)
            except DefectError as defect:
                outcomes.defects[str(defect)] += 1
                continue
            outcomes.ended[outcome] += 1
            if outcome == errors.QueueFullError.__name__:
                await asyncio.sleep(_RETRY_S)

    async def _outcome(self, request: SoakRequest) -> str:
        if request.leaving is Leaving.LOSE_CONNECTION:
            task = asyncio.create_task(self._ask_and_be_cut_off(request))
        else:
            task = asyncio.create_task(_ask(self._model, request))
        if request.leaving is Leaving.CANCEL_TASK:
            await asyncio.wait([task], timeout=request.after_s)
            task.cancel()
        await asyncio.wait([task], timeout=_LONGEST_S)
        if not task.done():
            task.cancel()
            raise DefectError(f"no end of a request whose client {request.leaving.value}")
        if task.cancelled():
            return request.leaving.value
        return _judged(request, task)

    async def _ask_and_be_cut_off(self, request: SoakRequest) -> GenerationResult | None:
        async with (
            Route.to(self._client.address) as (route, address),
            AsyncClient(address) as client,
        ):
            model = await client.model(self._model.id)
            asking = asyncio.create_task(_ask(model, request))
            await asyncio.wait([asking], timeout=request.after_s)
            route.cut()
            return await asking


async def _ask(model: AsyncModel, request: SoakRequest) -> GenerationResult | None:
    """The answer; None if the client has left before its end."""
    timeout = None
    if request.leaving is Leaving.RUN_OUT_OF_TIME:
        timeout = max(request.after_s, 0.001)
    if not request.streams:
        return await model.generate(**request.prompt, **request.parameters, timeout=timeout)
    stream = model.stream(**request.prompt, **request.parameters, timeout=timeout)
    pieces = 0
    async for _ in stream:
        pieces += 1
        if pieces == request.after_pieces and request.leaving is Leaving.DROP_STREAM:
            return None
        if pieces == request.after_pieces and request.leaving is Leaving.CANCEL_STREAM:
            stream.cancel()
    return stream.result


def _judged(request: SoakRequest, task: asyncio.Task[GenerationResult | None]) -> str:
    error = task.exception()
    if error is None:
        result = task.result()
        if result is None:
            return request.leaving.value
        _check(request, result)
        return "a result"
    if isinstance(error, errors.QueueFullError) and error.retry_after:
        return type(error).__name__
    expected: tuple[type[errors.LoaderdError], ...] = ()
    if request.is_bad:
        expected = errors.InvalidArgumentError, errors.UnsupportedOptionError
    elif request.leaving in _EXPECTED:
        expected = (_EXPECTED[request.leaving],)
    if not isinstance(error, expected):
        raise DefectError(f"{type(error).__name__}, whose client {request.leaving.value}: {error}")
    return request.leaving.value if not request.is_bad else type(error).__name__


def _check(request: SoakRequest, result: GenerationResult) -> None:
    """Whether a result is whole.

    Raises:
        DefectError: It is not.
    """
    if request.is_bad:
        raise DefectError(f"a result of {request.parameters}")
    if len(result.completions) != request.completions:
        raise DefectError(f"{len(result.completions)} of {request.completions} completions")
    if any(each.finish.reason is FinishReason.CANCELLED for each in result.completions):
        raise DefectError("a result of a request that was cancelled")
    if request.tokens not in {None, result.usage.generated_tokens}:
        raise DefectError(f"{result.usage.generated_tokens} tokens instead of {request.tokens}")
