"""A way to a daemon that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Route:
    """Passes bytes between a port of its own and a daemon, until it is cut."""

    def __init__(self, daemon: str) -> None:
        self._host, _, self._port = daemon.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    @asynccontextmanager
    async def to(cls, daemon: str) -> AsyncIterator[tuple[Route, str]]:
        """A route to `host:port`, and the address where it begins."""
        route = cls(daemon)
        server = await asyncio.start_server(route._pass, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield route, f"{host}:{port}"
        finally:
            server.close()
            route.cut()

    def cut(self) -> None:
        """Resets all connections, on both sides."""
        for writer in self._writers:
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(self._host, self._port)
        pair = {writer, onward_writer}
        self._writers |= pair
        try:
            await asyncio.gather(_copy(reader, onward_writer), _copy(onward_reader, writer))
        except ConnectionError:
            pass  # cut
        finally:
            self._writers -= pair
            for each in pair:
                each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
