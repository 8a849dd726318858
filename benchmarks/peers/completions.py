"""Reads a stream of OpenAI's HTTP interface of completions."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from benchmarks.figures import StreamTimes


async def read_completion(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> StreamTimes:
    """Sends a request and reads the events that answer it, to the end."""
    times = StreamTimes()
    try:
        async with session.post(url, json={**body, "stream": True}) as response:
            if response.status != 200:
                times.error = f"{response.status}: {(await response.text())[:200]}"
                return times
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(json.loads(line[len(b"data: ") :]), times)
    except aiohttp.ClientError as error:
        times.error = type(error).__name__
    return times


def _take(event: dict[str, Any], times: StreamTimes) -> None:
    if error := event.get("error"):
        times.error = str(error)
    if any(choice.get("text") for choice in event.get("choices", ())):
        times.arrive()
    if usage := event.get("usage"):
        times.tokens = usage["completion_tokens"]
