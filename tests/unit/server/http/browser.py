"""Requests over HTTP from the test's own event loop."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


def head(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode()


async def fetch(
    url: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str
) -> Reply:
    """One request on a connection of its own."""
    given = {"host": urlsplit(url).netloc} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    if isinstance(body, dict):
        given = {"content-type": "application/json"} | given
        body = json.dumps(body).encode()
    if body is not None:
        given = {"content-length": str(len(body))} | given
    reader, writer = await connect(url)
    try:
        writer.write(head("GET" if body is None else "POST", path, given) + (body or b""))
        async with asyncio.timeout(30):
            answer = await reader.read()
    finally:
        writer.close()
    top, _, content = answer.partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    named = {name.lower(): value.strip() for name, _, value in pairs}
    return Reply(int(first.split()[1]), named, content)
