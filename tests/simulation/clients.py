"""Calls that clients make on a simulated daemon, and how they may end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from loaderd.server.access.caller import OWNER
from loaderd.server.errors import LoaderdError
from loaderd.server.rpc.access import _caller
from loaderd.v1 import generation_pb2, model_pb2
from tests.simulation.daemon import SimulatedDaemon
from tests.simulation.loop import Clock
from tests.simulation.watcher import KnownLease, Watcher

_ALWAYS = {"DRAINING"}
_OF_LOADS = {
    "DEVICE_MEMORY",
    "MODEL_NOT_FOUND",
    "MODEL_NOT_LOADED",
    "MODEL_UNLOADED",
    "QUEUE_FULL",
    "UNSUPPORTED_OPTION",
}
_OF_REQUESTS = {"INVALID_ARGUMENT", "LEASE_NOT_FOUND"}
DOCUMENTED: dict[str, set[str]] = {
    "load": _OF_LOADS,
    "generate": _OF_LOADS | _OF_REQUESTS,
    "unload": {"MODEL_NOT_LOADED", "MODEL_IN_USE", "INVALID_ARGUMENT"},
    "acquire": {"MODEL_NOT_LOADED", "INVALID_ARGUMENT"},
    "renew": {"LEASE_NOT_FOUND"},
    "release": {"LEASE_NOT_FOUND"},
}
"""The reasons with which each call may end, if nothing is wrong with the box."""
IN_TROUBLE = {"WORKER_DIED", "MODEL_UNSUPPORTED", "HUB_UNREACHABLE", "REVISION_NOT_FOUND"}
"""Further reasons while workers fail and the hub is away."""


class _Context:
    """The caller, as services see it."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@dataclass(eq=False)
class Call:
    """One call under way.

    Attributes:
        kind: What it does.
        task: Its work.
        is_cancelled: Whether its client has left.
        in_trouble: Whether anything has been wrong with the box while it ran.
    """

    kind: str
    task: asyncio.Task[None]
    is_cancelled: bool = False
    in_trouble: bool = False


class Clients:
    """All clients of a daemon.

    Args:
        daemon: The daemon.
        watcher: Is told what they hold and what they force.
        loop: Where their calls run.
        clock: Its time.

    Attributes:
        running: Calls that have not ended.
        ended: How calls have ended, by what they did and how.
        problems: Calls that ended as they ought not to, as sentences.
        in_trouble: Whether anything is wrong with the box.
    """

    def __init__(
        self,
        daemon: SimulatedDaemon,
        watcher: Watcher,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
    ) -> None:
        self.running: list[Call] = []
        self.ended: Counter[str] = Counter()
        self.problems: list[str] = []
        self.in_trouble = False
        self._daemon = daemon
        self._watcher = watcher
        self._loop = loop
        self._clock = clock
        self._context: Any = _Context()

    def load(
        self,
        model: str,
        device_map: str | None = None,
        keep_alive: float | None = None,
        ttl: float | None = None,
    ) -> None:
        """Loads a model."""
        request = model_pb2.LoadModelRequest(
            model=model,
            options=model_pb2.LoadOptions(device_map=device_map),
            keep_alive=_duration(keep_alive),
            lease_ttl=_duration(ttl),
        )
        self._begin("load", self._load(request))

    def generate(
        self, model: str, count: int, keep_alive: float | None = None, lease_id: str | None = None
    ) -> None:
        """Generates so many deltas."""
        request = generation_pb2.StreamGenerateRequest(
            model=model, text=str(count), keep_alive=_duration(keep_alive), lease_id=lease_id
        )
        self._begin("generate", self._generate(request))

    def unload(self, model: str, force: bool, grace: float = 0.0) -> None:
        """Ends a model."""
        request = model_pb2.UnloadModelRequest(
            model=model, force=force, grace=_duration(grace if force else None)
        )
        self._begin("unload", self._unload(request))

    def acquire(self, model: str, ttl: float) -> None:
        """Acquires a lease."""
        request = model_pb2.AcquireLeaseRequest(model=model, ttl=_duration(ttl))
        self._begin("acquire", self._acquire(request))

    def renew(self, lease_id: str) -> None:
        """Renews a lease."""
        self._begin("renew", self._renew(lease_id))

    def release(self, lease_id: str) -> None:
        """Releases a lease."""
        self._begin("release", self._release(lease_id))

    def cancel(self, index: int) -> None:
        """A client leaves."""
        call = self.running[index % len(self.running)]
        call.is_cancelled = True
        call.task.cancel()

    def trouble(self) -> None:
        """From now on something is wrong with the box."""
        self.in_trouble = True
        for call in self.running:
            call.in_trouble = True

    def _begin(self, kind: str, work: Coroutine[Any, Any, None]) -> None:
        context = copy_context()
        context.run(_caller.set, OWNER)
        task = self._loop.create_task(work, context=context)
        call = Call(kind, task, in_trouble=self.in_trouble)
        self.running.append(call)
        call.task.add_done_callback(lambda _: self._ended(call))

    def _ended(self, call: Call) -> None:
        self.running.remove(call)
        error = None if call.task.cancelled() else call.task.exception()
        if call.task.cancelled():
            outcome = "cancelled"
            if not call.is_cancelled:
                self.problems.append(f"{call.kind}: cancelled, and not by its client")
        elif error is None:
            outcome = "done"
        elif isinstance(error, LoaderdError):
            outcome = error.reason
            allowed = DOCUMENTED[call.kind] | _ALWAYS | (IN_TROUBLE if call.in_trouble else set())
            if outcome not in allowed:
                self.problems.append(f"{call.kind}: {outcome}: {error}")
        else:
            outcome = repr(error)
            self.problems.append(f"{call.kind}: {error!r}")
        self.ended[f"{call.kind}: {outcome}"] += 1

    async def _load(self, request: model_pb2.LoadModelRequest) -> None:
        async for message in self._daemon.models.LoadModel(request, self._context):
            last = message
        if last.model.state != model_pb2.MODEL_STATE_READY:
            self.problems.append(f"load: ended with a model that is {last.model.state}")
        if last.HasField("lease"):
            self._hold(last.lease)

    async def _generate(self, request: generation_pb2.StreamGenerateRequest) -> None:
        model_id, text = "", ""
        try:
            async for message in self._daemon.generation.StreamGenerate(request, self._context):
                model_id = message.started.model_id or model_id
                text += message.delta.text
        except LoaderdError as error:
            is_gone = error.reason in {"MODEL_NOT_LOADED", "MODEL_UNLOADED"}
            if is_gone and model_id not in self._watcher.forced | {""}:
                self.problems.append(f"generate: {model_id} was unloaded while it was used")
            raise
        if len(text.split()) != int(request.text):
            self.problems.append(f"generate: {len(text.split())} deltas of {request.text}")
        lease = self._watcher.leases.get(request.lease_id)
        if lease is not None:
            lease.expires = max(lease.expires, self._clock.now + lease.ttl_s)

    async def _unload(self, request: model_pb2.UnloadModelRequest) -> None:
        if request.force:
            self._watcher.forcing[request.model] += 1
        try:
            response = await self._daemon.models.UnloadModel(request, self._context)
        finally:
            await asyncio.sleep(0)  # the watcher reads first what came of it
            if request.force:
                self._watcher.forcing[request.model] -= 1
        if response.model.state != model_pb2.MODEL_STATE_UNLOADED:
            self.problems.append(f"unload: ended with a model that is {response.model.state}")

    async def _acquire(self, request: model_pb2.AcquireLeaseRequest) -> None:
        self._hold((await self._daemon.models.AcquireLease(request, self._context)).lease)

    async def _renew(self, lease_id: str) -> None:
        request = model_pb2.RenewLeaseRequest(lease_id=lease_id)
        known = self._watcher.leases.get(lease_id)
        try:
            await self._daemon.models.RenewLease(request, self._context)
        except LoaderdError:
            await asyncio.sleep(0)  # the watcher reads first what came of the model
            if self._watcher.holds(lease_id):
                self.problems.append("renew: a lease had ended before its time")
            raise
        if known is not None:
            known.expires = self._clock.now + known.ttl_s

    async def _release(self, lease_id: str) -> None:
        self._watcher.leases.pop(lease_id, None)
        request = model_pb2.ReleaseLeaseRequest(lease_id=lease_id)
        await self._daemon.models.ReleaseLease(request, self._context)

    def _hold(self, lease: model_pb2.Lease) -> None:
        ttl = lease.ttl.ToTimedelta().total_seconds()
        self._watcher.leases[lease.id] = KnownLease(lease.model_id, ttl, self._clock.now + ttl)


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
