"""The daemon's side of download children: start, listen, watch, kill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from asyncio import StreamWriter
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from loaderd.server.errors import (
    DownloadInterruptedError,
    DrainingError,
    HubUnreachableError,
    InternalError,
    LoaderdError,
)
from loaderd.server.logs.call import bound
from loaderd.server.logs.children import ChildLog
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_messages import (
    GO,
    Alive,
    Defect,
    Done,
    Message,
    Operation,
    Request,
    decode,
)
from loaderd.server.store.names import HubName
from loaderd.server.store.plan import DownloadPlan, DownloadProgress
from loaderd.server.tracing.spans import current, stage

MAX_CHILDREN = 8
"""How many requests of a kind run at once; the others wait for their turn."""

_START_TIMEOUT = 60.0
_LONGEST_LINE = 64 << 20
_COMMAND = (sys.executable, "-P", "-m", "loaderd.server.store.hub_child")
# Settings and secrets that are not for the child: it gets its own settings, and the token by stdin.
_NOT_INHERITED = ("HF_", "HUGGING", "LOADERD_", "OTEL_", "TRANSFORMERS_")

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
        self.apply(access, stall_timeout)
        self._children: set[Process] = set()
        self._burials: set[asyncio.Task[None]] = set()
        # Plans do not wait for downloads, which may take hours.
        self._turns: dict[Operation, asyncio.Semaphore] = {
            "plan": asyncio.Semaphore(MAX_CHILDREN),
            "download": asyncio.Semaphore(MAX_CHILDREN),
        }
        self._closed = False

    def apply(self, access: HubAccess, stall_timeout: float) -> None:
        """Asks another hub, or otherwise, from the next request on; see `Downloads`."""
        self._stall_timeout = stall_timeout
        longest = min(access.retry.longest_wait, stall_timeout / 2)
        self._access = replace(access, retry=replace(access.retry, longest_wait=longest))

    async def plan(self, name: HubName, *, allow_pickle: bool = False) -> DownloadPlan:
        """See `hub.plan`."""
        async with self._child(self._request("plan", name, allow_pickle)) as child:
            return await self._plan(child, name)

    async def download(
        self,
        name: HubName,
        publish: Callable[[DownloadProgress], None],
        *,
        admit: Callable[[DownloadPlan], Awaitable[None]],
        distrusted: Collection[str] = (),
        allow_pickle: bool = False,
    ) -> Done:
        """Asks the hub what a name is now, and brings it into the cache.

        Cancelling this kills the child. What came of a file is kept for the next download.

        Args:
            name: The repository and revision.
            publish: Told how far it is.
            admit: Told what will be fetched before anything is. What it raises ends the download.
            distrusted: Paths whose content is bad although size and header are right.
            allow_pickle: The operator allows weights in pickles for this repository.

        Raises:
            HubUnreachableError: Also when there was no progress for the stall time-out.
            DownloadInterruptedError: The child was killed from outside.
            LoaderdError: See `hub.plan` and `hub.download`.
        """
        request = self._request("download", name, allow_pickle, distrusted)
        async with self._child(request) as child:
            with stage("plan"):
                plan = await self._plan(child, name)
            await admit(plan)
            _stdin(child).write(GO)
            with stage("transfer"):
                answer = await self._answer(child, name, self._stall_timeout, publish)
            if not isinstance(answer, Done):
                raise TypeError(f"the child answered a download with {answer!r}")
            return answer

    async def close(self) -> None:
        """Kills all children; later requests are refused."""
        self._closed = True
        children = list(self._children)
        for child in children:
            _kill(child)
        await asyncio.gather(*(child.wait() for child in children))

    async def _plan(self, child: Process, name: HubName) -> DownloadPlan:
        answer = await self._answer(child, name, _START_TIMEOUT, lambda _: None)
        if not isinstance(answer, DownloadPlan):
            raise TypeError(f"the child answered a plan with {answer!r}")
        return answer

    async def _answer(
        self,
        child: Process,
        name: HubName,
        patience: float,
        publish: Callable[[DownloadProgress], None],
    ) -> DownloadPlan | Done:
        """What a child answers in the end; raises what it raises.

        Args:
            child: The child.
            name: What it asks the hub for.
            patience: Seconds until its first sign of life.
            publish: Told how far it is.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience
        while True:
            match await self._next_message(child, name, deadline):
                case DownloadProgress() as progress:
                    publish(progress)  # no sign of life: a rate that falls is news too
                case Alive():
                    deadline = clock() + self._stall_timeout
                case DownloadPlan() | Done() as answer:
                    return answer
                case LoaderdError() as error:
                    raise error
                case Defect(traceback):
                    incident = uuid4().hex
                    _log.error("incident %s, download of %s:\n%s", incident, name, traceback)
                    raise InternalError(incident)

    async def _next_message(self, child: Process, name: HubName, deadline: float) -> Message:
        if child.stdout is None:
            raise RuntimeError("the child was started without a pipe")
        try:
            async with asyncio.timeout_at(deadline):
                line = await child.stdout.readline()
        except TimeoutError:
            _log.warning("download of %s: no progress for too long; given up", name)
            raise HubUnreachableError(str(name)) from None
        if line.endswith(b"\n"):
            return decode(line)
        if self._closed:
            raise DrainingError
        _log.error("download of %s: its process was killed", name)
        raise DownloadInterruptedError(str(name))

    @asynccontextmanager
    async def _child(self, request: Request) -> AsyncIterator[Process]:
        """A child with a request, when it is its turn; on leaving it is killed."""
        async with self._turns[request.operation]:
            if self._closed:
                raise DrainingError
            span = current()
            log = ChildLog(
                model=request.repo_id,
                request_id=bound().get("request_id"),
                **(span.ids if span is not None else {}),
            )
            try:
                child = await asyncio.create_subprocess_exec(
                    *_COMMAND,
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=log.stderr,
                    limit=_LONGEST_LINE,
                    env=_environment(request),
                    start_new_session=True,  # Ctrl-C is for the daemon, which ends it itself
                )
            finally:
                log.begun()
            self._children.add(child)
            try:
                if self._closed:
                    raise DrainingError
                # stdin stays open: its end tells the child that the daemon is gone.
                _stdin(child).write(request.to_line())
                yield child
            finally:
                _kill(child)
                await self._bury(child)

    async def _bury(self, child: Process) -> None:
        """Waits until a killed child is gone, whose end does not depend on who waits for it."""

        async def bury() -> None:
            await child.communicate()
            self._children.discard(child)

        burial = asyncio.create_task(bury())
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)
        await asyncio.shield(burial)

    def _request(
        self,
        operation: Operation,
        name: HubName,
        allow_pickle: bool,
        distrusted: Collection[str] = (),
    ) -> Request:
        return Request(
            operation,
            name.repo_id,
            name.revision,
            str(self._cache_dir),
            self._access.endpoint,
            self._access.token,
            self._access.retry,
            allow_pickle,
            tuple(distrusted),
        )


def _environment(request: Request) -> dict[str, str]:
    """What the hub library reads when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    return inherited | {
        "HF_ENDPOINT": request.endpoint,
        "HF_HUB_CACHE": request.cache_dir,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _stdin(child: Process) -> StreamWriter:
    if child.stdin is None:
        raise RuntimeError("the child was started without a pipe")
    return child.stdin


def _kill(child: Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
