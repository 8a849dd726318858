"""A daemon that knows clients, reached over HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from openai import AsyncOpenAI

from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.command import create_token
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role
from loaderd.server.rpc.access import Access
from tests.unit.server.box import Box, open_box
from tests.unit.server.http.browser import fetch


class Gate:
    """A daemon that knows clients, and a token for each role."""

    def __init__(self, box: Box, tokens: dict[Role, str]) -> None:
        self.box = box
        self.tokens = tokens

    def openai(self, role: Role) -> AsyncOpenAI:
        url = f"{self.box.url}/v1"
        return AsyncOpenAI(base_url=url, api_key=self.tokens[role], max_retries=0, timeout=30)

    async def status(self, path: str, role: Role | None) -> int:
        headers = {} if role is None else {"authorization": f"Bearer {self.tokens[role]}"}
        return (await fetch(self.box.url, path, None, **headers)).status


@asynccontextmanager
async def open_gate(folder: Path) -> AsyncIterator[Gate]:
    """One with a client for each role, that may have one stream each.

    Args:
        folder: Where its files go.
    """
    file = folder / "clients.toml"
    tokens = {
        role: create_token(file, f"some-{role}", role, None)
        for role in (Role.ADMIN, Role.USER, Role.MONITOR)
    }
    file.write_text(f"{file.read_text()}\n[limits]\nstreams = 1\n")
    access = Access(ClientsFile(file), Quotas(time.monotonic))
    async with open_box(folder, access=access, http=True) as box:
        yield Gate(box, tokens)
