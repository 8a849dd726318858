"""The daemon's side of download children: start, listen, watch, kill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from loaderd.server.errors import (
    DrainingError,
    HubUnreachableError,
    InternalError,
    LoaderdError,
    WorkerDiedError,
)
from loaderd.server.store.blobs import sweep
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_messages import (
    Defect,
    Done,
    Message,
    Operation,
    Request,
    decode,
)
from loaderd.server.store.names import HubName
from loaderd.server.store.plan import DownloadPlan, DownloadProgress

_START_TIMEOUT = 60.0
_LONGEST_LINE = 64 << 20
_COMMAND = (sys.executable, "-P", "-m", "loaderd.server.store.hub_child")
# Settings and secrets that are not for the child: it gets its own settings, and the token by stdin.
_NOT_INHERITED = ("HF_", "HUGGING", "LOADERD_", "TRANSFORMERS_")

_log = logging.getLogger(__name__)


class Downloads:
    """Runs each request to the hub in a child process of its own.

    Args:
        cache_dir: The Hugging Face cache.
        access: The hub.
        stall_timeout: Seconds without a sign of life after which a child is killed.
    """

    def __init__(self, cache_dir: Path, access: HubAccess, stall_timeout: float) -> None:
        self._cache_dir = cache_dir
        self._stall_timeout = stall_timeout
        longest = min(access.retry.longest_wait, stall_timeout / 2)
        self._access = replace(access, retry=replace(access.retry, longest_wait=longest))
        self._children: set[Process] = set()
        self._closed = False

    async def plan(self, name: HubName) -> DownloadPlan:
        """See `hub.plan`."""
        answer = await self._ask("plan", name, lambda _: None)
        if not isinstance(answer, DownloadPlan):
            raise TypeError(f"the child answered a plan with {answer!r}")
        return answer

    async def download(self, name: HubName, publish: Callable[[DownloadProgress], None]) -> str:
        """Asks the hub what a name is now, and brings it into the cache; returns the commit.

        Cancelling this kills the child. What it had not finished is deleted.

        Raises:
            HubUnreachableError: Also when there was no progress for the stall time-out.
            WorkerDiedError: The child was killed from outside.
            LoaderdError: See `hub.plan` and `hub.download`.
        """
        try:
            answer = await self._ask("download", name, publish)
        finally:
            await asyncio.to_thread(sweep, RepoFolder(self._cache_dir, name.repo_id))
        if not isinstance(answer, Done):
            raise TypeError(f"the child answered a download with {answer!r}")
        return answer.commit

    async def close(self) -> None:
        """Kills all children; later requests are refused."""
        self._closed = True
        children = list(self._children)
        for child in children:
            _kill(child)
        await asyncio.gather(*(child.wait() for child in children))

    async def _ask(
        self, operation: Operation, name: HubName, publish: Callable[[DownloadProgress], None]
    ) -> DownloadPlan | Done:
        """Lets a child do one thing; raises what it raises."""
        timeout = _START_TIMEOUT
        async with self._child(self._request(operation, name)) as child:
            while True:
                match await self._next_message(child, name, timeout):
                    case DownloadProgress() as progress:
                        publish(progress)
                    case DownloadPlan() | Done() as answer:
                        return answer
                    case LoaderdError() as error:
                        raise error
                    case Defect(traceback):
                        incident = uuid4().hex
                        _log.error("incident %s, download of %s:\n%s", incident, name, traceback)
                        raise InternalError(incident)
                timeout = self._stall_timeout

    async def _next_message(self, child: Process, name: HubName, patience: float) -> Message:
        if child.stdout is None:
            raise RuntimeError("the child was started without a pipe")
        try:
            async with asyncio.timeout(patience):
                line = await child.stdout.readline()
        except TimeoutError:
            _log.warning("download of %s: no progress for %.0f s; given up", name, patience)
            raise HubUnreachableError(str(name)) from None
        if line.endswith(b"\n"):
            return decode(line)
        if self._closed:
            raise DrainingError
        _log.error("download of %s: its process was killed", name)
        raise WorkerDiedError(str(name))

    @asynccontextmanager
    async def _child(self, request: Request) -> AsyncIterator[Process]:
        """A child with a request; on leaving it is dead."""
        child = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=PIPE,
            stdout=PIPE,
            limit=_LONGEST_LINE,
            env=_environment(request),
            start_new_session=True,  # Ctrl-C is for the daemon, which ends its children itself
        )
        self._children.add(child)
        try:
            if self._closed or child.stdin is None:
                raise DrainingError
            # stdin stays open: its end tells the child that the daemon is gone.
            child.stdin.write(request.to_line())
            yield child
        finally:
            _kill(child)
            await child.communicate()
            self._children.discard(child)

    def _request(self, operation: Operation, name: HubName) -> Request:
        return Request(
            operation,
            name.repo_id,
            name.revision,
            str(self._cache_dir),
            self._access.endpoint,
            self._access.token,
            self._access.retry,
        )


def _environment(request: Request) -> dict[str, str]:
    """What the hub library reads when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    return inherited | {
        "HF_ENDPOINT": request.endpoint,
        "HF_HUB_CACHE": request.cache_dir,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def _kill(child: Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
