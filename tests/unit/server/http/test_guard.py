from __future__ import annotations

import asyncio

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from loaderd.server.http.guard import Bounded


async def test_too_many_requests_at_once_are_refused() -> None:
    release, running = asyncio.Event(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        running.append(scope)
        await release.wait()

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(_: Message) -> None:
        pass

    bounded = Bounded(app, most=2)
    open_requests = [asyncio.create_task(bounded({}, receive, send)) for _ in range(2)]
    while len(running) < 2:
        await asyncio.sleep(0)
    with pytest.raises(HTTPException) as caught:
        await bounded({}, receive, send)
    assert caught.value.status_code == 503
    assert caught.value.headers == {"Retry-After": "1"}
    release.set()
    await asyncio.gather(*open_requests)
    await bounded({}, receive, send)
    assert len(running) == 3
