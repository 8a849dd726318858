"""A worker without a model: speaks the real link from inside the test's event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import grpc

from loaderd.server import errors
from loaderd.server.supervisor.launcher import WorkerProcess
from loaderd.v1 import generation_pb2, model_pb2, system_pb2
from loaderd.worker.v1 import worker_pb2, worker_pb2_grpc

PROMPT_TOKENS = 5
"""Of every request."""

_pids = itertools.count(100_000)


class FakeWorker:
    """A process stand-in whose requests are scripted by their text.

    - "count N": N deltas "0 ", "1 ", ...; "hang": nothing after `started`; "die": the process
      ends; "fail": a DEVICE_MEMORY error; "flood": deltas of 64 KiB without end.
    """

    def __init__(self, launcher: FakeLauncher, worker_id: str, token: str, link: str) -> None:
        self.pid = next(_pids)
        self.silent = False
        self.deaf_to_calls = False
        self.model = ""
        self._calls: list[int] = []
        self.loads: list[worker_pb2.Load] = []
        self.cancelled: list[int] = []
        self.clients: list[str] = []
        self.traces: list[worker_pb2.TraceContext] = []
        self._launcher = launcher
        self._identity = worker_pb2.Hello(worker_id=worker_id, token=token)
        self._link = link
        self._events: asyncio.Queue[worker_pb2.AttachRequest] = asyncio.Queue()
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run())

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def serves(self, model: str) -> None:
        self.model = model

    def kill(self) -> None:
        self._main.cancel()

    @property
    def running_requests(self) -> int:
        return len(self._requests)

    @property
    def exited(self) -> bool:
        return self._exit.done()

    def answer_calls(self) -> None:
        for key in self._calls:
            reply = worker_pb2.Reply(key=key)
            reply.tokenize.token_ids.extend([1, 2, 3])
            self._send(reply=reply)
        self._calls.clear()

    def beat(self, own_bytes: int) -> None:
        self._send(heartbeat=worker_pb2.Heartbeat(own_bytes=own_bytes))

    def report(self, report: worker_pb2.EngineReport) -> None:
        self._output(worker_pb2.Output(report=report))

    async def _run(self) -> None:
        try:
            async with grpc.aio.insecure_channel(self._link) as channel:
                stub = worker_pb2_grpc.WorkerLinkServiceStub(channel)
                self._send(hello=self._identity)
                commands = stub.Attach(self._outgoing())
                self._send(heartbeat=worker_pb2.Heartbeat(memory_bytes=1 << 20))
                await self._launcher.standby_gate.wait()
                self._send(
                    standby=worker_pb2.Standby(
                        devices=self._launcher.devices,
                        versions={"torch": "0"},
                        measured_at=time.monotonic(),
                    )
                )
                async for command in commands:
                    if command.HasField("shutdown"):
                        return
                    await self._obey(command)
        except grpc.aio.AioRpcError:
            pass  # the daemon cut the link: a real worker ends too
        finally:
            for request in self._requests.values():
                request.cancel()
            if not self._exit.done():
                self._exit.set_result(0)

    async def _outgoing(self) -> AsyncIterator[worker_pb2.AttachRequest]:
        while True:
            yield await self._events.get()

    async def _obey(self, command: worker_pb2.AttachResponse) -> None:
        if command.HasField("load"):
            await self._load(command.load)
        elif command.HasField("generate"):
            key = command.generate.key
            self.clients.append(command.generate.client)
            self.traces.append(command.generate.trace)
            task = asyncio.create_task(self._generate(key, command.generate.request))
            self._requests[key] = task
        elif command.HasField("cancel"):
            self.cancelled.append(command.cancel.key)
            if command.cancel.key in self._requests:
                self._requests.pop(command.cancel.key).cancel()
        elif command.HasField("call"):
            self._calls.append(command.call.key)
            if not self.deaf_to_calls:
                self.answer_calls()

    async def _load(self, load: worker_pb2.Load) -> None:
        self.loads.append(load)
        self._launcher.loads += 1
        await self._launcher.load_gate.wait()
        if self._launcher.dies_in_load:
            self.kill()
        elif self._launcher.load_error is not None:
            self._send(load_failed=worker_pb2.LoadFailed(error=_error(self._launcher.load_error)))
        else:
            details = model_pb2.ModelDetails(architecture="Fake", engine="fake")
            held = self._launcher.held_bytes
            self._send(loaded=worker_pb2.Loaded(details=details, held_bytes=held))

    async def _generate(self, key: int, request: generation_pb2.StreamGenerateRequest) -> None:
        verb, _, number = request.text.partition(" ")
        started = generation_pb2.GenerationStarted(
            request_id=request.request_id, seed=7, prompt_tokens=PROMPT_TOKENS
        )
        self._output(worker_pb2.Output(key=key, started=started))
        if verb == "hang":
            return
        if verb == "die":
            self.kill()
            return
        if verb == "fail":
            error = _error(errors.DeviceMemoryError(model="fake"))
            self._output(worker_pb2.Output(key=key, error=error))
            return
        texts = ("x" * 65536 for _ in itertools.count()) if verb == "flood" else None
        for text in texts or (f"{i} " for i in range(int(number))):
            delta = generation_pb2.GenerationDelta(text=text)
            self._output(worker_pb2.Output(key=key, delta=delta))
            await asyncio.sleep(0)
        finish = generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH)
        usage = generation_pb2.Usage(prompt_tokens=PROMPT_TOKENS, generated_tokens=int(number))
        finished = generation_pb2.GenerationFinished(finishes=[finish], seed=7, usage=usage)
        self._output(worker_pb2.Output(key=key, finished=finished))
        self._requests.pop(key, None)

    def _output(self, output: worker_pb2.Output) -> None:
        self._send(step=worker_pb2.Step(outputs=[output]))

    def _send(self, **event: object) -> None:
        if not self.silent:
            self._events.put_nowait(worker_pb2.AttachRequest(**event))  # type: ignore[arg-type]


def _error(error: errors.LoaderdError) -> worker_pb2.Error:
    return worker_pb2.Error(reason=error.number, metadata=error.metadata)


class FakeLauncher:
    """Launches fake workers.

    Attributes:
        workers: All that were launched.
        loads: Number of loads that they were asked for.
        standby_gate: Workers become ready when it is set.
        load_gate: Loads end when it is set.
        load_error: What loads fail with.
        dies_in_load: Whether workers end while they load.
        broken: Whether launching fails.
        devices: What workers see.
        held_bytes: What each load takes, by device.
    """

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.loads = 0
        self.standby_gate = asyncio.Event()
        self.standby_gate.set()
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.load_error: errors.LoaderdError | None = None
        self.dies_in_load = False
        self.broken = False
        self.devices = [system_pb2.Device(id="cpu", type=system_pb2.DEVICE_TYPE_CPU)]
        self.held_bytes: dict[str, int] = {}

    async def launch(self, worker_id: str, token: str, link: str) -> WorkerProcess:
        if self.broken:
            raise OSError("cannot launch")
        worker = FakeWorker(self, worker_id, token, link)
        self.workers.append(worker)
        return worker
