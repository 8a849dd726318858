"""What is measured: servers of one model, each in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import psutil

from benchmarks.figures import StreamTimes
from benchmarks.peers.completions import read_completion
from benchmarks.peers.installation import FOLDER
from benchmarks.streams import SdkReader, spawned_daemon
from loaderd.client import AsyncClient
from loaderd.client.types import DtypeName

DTYPE: DtypeName = "bfloat16"
_START_SECONDS = 600.0
_STOP_SECONDS = 30.0


class Server(Protocol):
    """A server of one model: started, read from, and stopped."""

    name: str

    async def start(self) -> None:
        """Starts it and returns when it can serve."""

    async def read(self, prompt: str, tokens: int) -> StreamTimes:
        """Sends a prompt, wants this many new tokens, greedy, and reads the stream to its end."""

    async def stop(self) -> None:
        """Ends its processes."""

    def cpu_seconds(self) -> float:
        """What its processes have computed so far."""


class Loaderd:
    """A daemon of this working tree, read through the SDK.

    Args:
        model: Folder of the model.
        environment: Further variables.
    """

    name = "loaderd"

    def __init__(self, model: Path, environment: Mapping[str, str]) -> None:
        self._model = model
        self._environment = environment
        self._stack = AsyncExitStack()
        self._pid = 0

    async def start(self) -> None:
        """See `Server`."""
        daemon = self._stack.enter_context(spawned_daemon(self._model, self._environment))
        self._pid = daemon.process.pid
        client = await self._stack.enter_async_context(AsyncClient(daemon.address))
        self._reader = SdkReader(await client.load(str(self._model), dtype=DTYPE))

    async def read(self, prompt: str, tokens: int) -> StreamTimes:
        """See `Server`."""
        return await self._reader(prompt, tokens)

    async def stop(self) -> None:
        """See `Server`."""
        await self._stack.aclose()

    def cpu_seconds(self) -> float:
        """See `Server`."""
        return _cpu_seconds(self._pid)


class CompletionServer(ABC):
    """A server with OpenAI's HTTP interface of completions.

    Args:
        model: Folder of the model.
        environment: Further variables.
        streams: Most that will be read at once.
    """

    name: str

    def __init__(self, model: Path, environment: Mapping[str, str], streams: int) -> None:
        self.model = model
        self.streams = streams
        self._environment = environment
        self._stack = AsyncExitStack()
        self._url = ""
        self._pid = 0

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """Its command line; it shall listen on this port of 127.0.0.1."""

    @abstractmethod
    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """The request for this many tokens, greedy, whatever the model says of its end."""

    def variables(self) -> dict[str, str]:
        """Further environment variables that it needs."""
        return {}

    async def start(self) -> None:
        """See `Server`."""
        port = _free_port()
        command = self.command(port)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self.variables(), **self._environment}
        environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
        log = self._stack.enter_context(self.log_path.open("wb"))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        self._pid = process.pid
        self._stack.push_async_callback(_end_group, process)
        self._url = f"http://127.0.0.1:{port}"
        # Kept connections would be closed by servers while it is the others' turn.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())
        self._session = await self._stack.enter_async_context(session)
        try:
            await self._ready(process)
        except BaseException:
            await self.stop()
            raise

    async def read(self, prompt: str, tokens: int) -> StreamTimes:
        """See `Server`."""
        url = f"{self._url}/v1/completions"
        return await read_completion(self._session, url, self.body(prompt, tokens))

    async def stop(self) -> None:
        """See `Server`."""
        await self._stack.aclose()

    def cpu_seconds(self) -> float:
        """See `Server`."""
        return _cpu_seconds(self._pid)

    @property
    def log_path(self) -> Path:
        """What it prints."""
        return FOLDER / f"{self.name.replace(' ', '-')}.log"

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(_START_SECONDS):
            while True:
                if process.returncode is not None:
                    raise RuntimeError(f"{self.name} ended while it started; see {self.log_path}")
                try:
                    async with self._session.get(f"{self._url}/health") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass  # it does not listen yet
                await asyncio.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """Ends the processes that a server is made of: kindly, then not."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    seconds = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds
