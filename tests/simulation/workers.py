"""Worker processes of a simulated box: they take memory, answer, fail, hang and die."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

from loaderd.server import errors
from loaderd.server.models.placement import Needs
from loaderd.server.models.where import CPU
from loaderd.server.supervisor.launcher import WorkerProcess
from loaderd.server.supervisor.link import WorkerLink
from loaderd.v1 import generation_pb2, model_pb2
from loaderd.worker.v1 import worker_pb2
from tests.simulation.hardware import Hardware

_HEARTBEAT_S = 10.0
_LONGEST_DEATH_S = 0.5
_STUCK_S = 40.0
"""So long the kernel may keep a process that was killed."""


class Fate(Enum):
    """How loads of new workers end."""

    WELL = "well"
    REFUSED = "refused"
    OUT_OF_MEMORY = "out of memory"
    DEATH = "death"
    SILENCE = "silence"
    NO_START = "no start"
    DEATH_AT_START = "death at start"


@dataclass
class Grant:
    """What the planner let a load take.

    Attributes:
        devices: Bytes by device.
        needs: What they are made of.
    """

    devices: Mapping[str, int]
    needs: Needs

    def loaded(self, device: str) -> int:
        """What the worker says that it holds when it has loaded."""
        needs = self.needs
        later = needs.headroom + needs.margin // len(self.devices)
        later += needs.kv_cache if device == CPU else 0
        return max(self.devices[device] - later, 0)


class SimulatedWorker(WorkerProcess):
    """One process. It takes no more than its grant.

    Requests generate as many deltas as their text says, one every tenth of a second.
    """

    def __init__(self, box: SimulatedLauncher, pid: int, link: WorkerLink) -> None:
        self.grant: Grant | None = None
        self.is_silent = False
        self._pid = pid
        self._box = box
        self._random = box.random
        self._link = link
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._dying: asyncio.TimerHandle | None = None
        self._tasks = {self._start(self._run()), self._start(self._beat())}

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self._exit.done()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def serves(self, model: str) -> None:
        """It writes no log."""

    def kill(self) -> None:
        """SIGKILL; the kernel takes its time."""
        if self.alive and self._dying is None:
            self._stop()
            stuck = self._box.sticks and self._random.random() < 0.2
            wait = _STUCK_S if stuck else self._random.uniform(0, _LONGEST_DEATH_S)
            loop = asyncio.get_running_loop()
            self._dying = loop.call_later(wait, self._end, -9)

    def crash(self) -> None:
        """It ends by itself, now."""
        self._stop()
        self._end(-11)

    def hang(self) -> None:
        """It says nothing any more."""
        self.is_silent = True
        self._stop()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    def _stop(self) -> None:
        for task in (*self._tasks, *self._requests.values()):
            task.cancel()

    def _end(self, code: int) -> None:
        if self.alive:
            self._box.hardware.give_back(self.pid)
            self._box.alive.discard(self)
            self._exit.set_result(code)
            self._link.hang_up()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            self._send(heartbeat=self._heartbeat())

    def _heartbeat(self) -> worker_pb2.Heartbeat:
        held = self._box.hardware.held(self.pid)
        cpu_only = self.grant is not None and tuple(self.grant.devices) == (CPU,)
        return worker_pb2.Heartbeat(memory_bytes=held, own_bytes=held if cpu_only else 0)

    async def _run(self) -> None:
        fate = self._box.fate
        await asyncio.sleep(self._random.uniform(1, 6))  # its imports
        if fate is Fate.DEATH_AT_START:
            self.crash()
            return
        self._send(standby=self._box.standby())
        async for command in self._link.commands():
            kind = command.WhichOneof("command")
            if kind == "shutdown":
                break
            if kind == "load":
                await self._load()
            elif kind == "generate":
                request = command.generate
                work = self._generate(request.key, int(request.request.text))
                self._requests[request.key] = self._start(work)
            elif kind == "cancel" and command.cancel.key in self._requests:
                self._requests.pop(command.cancel.key).cancel()
        await asyncio.sleep(self._random.choice((0, 0.2, 1, 5)))  # sometimes longer than its grace
        self._stop()
        self._end(0)

    async def _load(self) -> None:
        grant, fate = self.grant, self._box.fate
        if grant is None:
            raise AssertionError("a load that the planner knows nothing of")
        for part in (0.1, 0.5, 1.0):
            await asyncio.sleep(self._random.uniform(0, 5))
            for device in grant.devices:
                # What it takes besides, which nobody measures, is there from the beginning.
                besides = 0 if device == CPU else grant.needs.headroom
                taken = int(part * grant.loaded(device)) + besides
                self._box.hardware.take(self.pid, device, min(taken, grant.devices[device]))
            self._send(heartbeat=self._heartbeat())
        if fate is Fate.DEATH:
            self.crash()
        elif fate is Fate.SILENCE:
            self.hang()
        elif fate is Fate.REFUSED:
            self._refuse(errors.ModelUnsupportedError(model="x", problem="y"))
        elif fate is Fate.OUT_OF_MEMORY:
            self._refuse(errors.DeviceMemoryError(model="x"))
        else:
            held = {device: grant.loaded(device) for device in grant.devices}
            details = model_pb2.ModelDetails(architecture="Simulated", engine="simulated")
            self._send(loaded=worker_pb2.Loaded(details=details, held_bytes=held))

    def _refuse(self, error: errors.LoaderdError) -> None:
        self._send(load_failed=worker_pb2.LoadFailed(error=_error(error)))

    async def _generate(self, key: int, count: int) -> None:
        if self.grant is not None:  # keys, values and what a step computes with
            for device, most in self.grant.devices.items():
                self._box.hardware.take(self.pid, device, most)
        started = generation_pb2.GenerationStarted(request_id="x", seed=7)
        self._output(worker_pb2.Output(key=key, started=started))
        for number in range(count):
            await asyncio.sleep(0.1)
            delta = generation_pb2.GenerationDelta(text=f"{number} ")
            self._output(worker_pb2.Output(key=key, delta=delta))
        finish = generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH)
        finished = generation_pb2.GenerationFinished(finishes=[finish], seed=7)
        self._requests.pop(key, None)
        self._output(worker_pb2.Output(key=key, finished=finished))

    def _output(self, output: worker_pb2.Output) -> None:
        self._send(step=worker_pb2.Step(outputs=[output]))

    def _send(self, **event: Any) -> None:
        if self.alive and not self.is_silent:
            self._link.receive(worker_pb2.AttachRequest(**event))


class SimulatedLauncher:
    """Launches simulated workers.

    Args:
        hardware: Whose memory they take.
        clock: Monotonic seconds.
        random: How long everything takes.

    Attributes:
        alive: Workers that have not ended.
        fate: How loads end from now on.
        sticks: Whether the kernel keeps some processes for long.
    """

    def __init__(self, hardware: Hardware, clock: Callable[[], float], random: Random) -> None:
        self.hardware = hardware
        self.random = random
        self.alive: set[SimulatedWorker] = set()
        self.fate = Fate.WELL
        self.sticks = False
        self._clock = clock
        self._pids = itertools.count(1)
        self.expected: dict[str, WorkerLink] = {}

    async def launch(self, worker_id: str, token: str, link: str) -> WorkerProcess:
        await asyncio.sleep(self.random.uniform(0, 0.5))
        if self.fate is Fate.NO_START:
            raise OSError("cannot start")
        worker = SimulatedWorker(self, next(self._pids), self.expected.pop(worker_id))
        self.alive.add(worker)
        return worker

    def standby(self) -> worker_pb2.Standby:
        """What a worker says of the box when it has imported its libraries."""
        return worker_pb2.Standby(devices=self.hardware.seen(), measured_at=self._clock())

    def grant(self, pid: int, grant: Grant) -> None:
        """Lets a worker take memory."""
        for worker in self.alive:
            if worker.pid == pid:
                worker.grant = grant


class SimulatedLinks:
    """The place of the socket that workers attach to: here they are there at once."""

    def __init__(self, launcher: SimulatedLauncher, folder: Path) -> None:
        self.address = str(folder)
        self._launcher = launcher

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def expect(self, worker_id: str, token: str, link: WorkerLink) -> None:
        self._launcher.expected[worker_id] = link

    def forget(self, worker_id: str) -> None:
        self._launcher.expected.pop(worker_id, None)


def _error(error: errors.LoaderdError) -> worker_pb2.Error:
    return worker_pb2.Error(reason=error.number, metadata=error.metadata)
