"""The daemon's end of the stream to one worker: commands out, events to whom they concern."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import DecodeError

from loaderd.server.errors import InvalidArgumentError, LoaderdError
from loaderd.server.supervisor.engine_meter import EngineMeter
from loaderd.server.supervisor.output_stream import OutputStream, Watch
from loaderd.server.tracing.spans import current
from loaderd.v1 import generation_pb2
from loaderd.worker.v1 import worker_pb2


class WorkerLink:
    """One worker's stream.

    Everything that waits on the worker waits here, so that `fail` can end all of it at once.

    Args:
        max_stream_bytes: Most bytes that may wait for one slow client.

    Attributes:
        standby: What the worker said when it was ready for a load.
        loaded: What the worker said when it had loaded.
        memory_bytes: The memory that it held at its last heartbeat.
        own_bytes: Of main memory, what it then held without mapped files.
        last_seen: Monotonic time of its last event.
        engine: What its engine does.
    """

    def __init__(self, max_stream_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self.standby: asyncio.Future[worker_pb2.Standby] = loop.create_future()
        self.loaded: asyncio.Future[worker_pb2.Loaded] = loop.create_future()
        self.memory_bytes = 0
        self.own_bytes = 0
        self.last_seen = time.monotonic()
        self.engine = EngineMeter()
        self._max_stream_bytes = max_stream_bytes
        self._commands: asyncio.Queue[worker_pb2.AttachResponse | None] = asyncio.Queue()
        self._keys = itertools.count(1)
        self._streams: dict[int, OutputStream] = {}
        self._calls: dict[int, asyncio.Future[worker_pb2.Reply]] = {}
        self._failure: LoaderdError | None = None

    @property
    def failed(self) -> bool:
        """Whether the worker has ended, or is being ended, and serves nobody any more."""
        return self._failure is not None

    @property
    def queued(self) -> int:
        """Requests whose turn has not come."""
        return sum(not stream.started for stream in self._streams.values())

    def load(self, load: worker_pb2.Load) -> asyncio.Future[worker_pb2.Loaded]:
        """Sends the load; the future ends with it."""
        if (trace := _trace_context()) is not None:
            load.trace.CopyFrom(trace)
        self._commands.put_nowait(worker_pb2.AttachResponse(load=load))
        return self.loaded

    def shutdown(self) -> None:
        """Asks the worker to end."""
        self._commands.put_nowait(worker_pb2.AttachResponse(shutdown=worker_pb2.Shutdown()))
        self.hang_up()

    def hang_up(self) -> None:
        """Ends the stream, and so the worker."""
        self._commands.put_nowait(None)

    @contextmanager
    def generate(
        self,
        request: generation_pb2.StreamGenerateRequest,
        on_end: Callable[[], None],
        client: str = "",
        watch: Watch | None = None,
    ) -> Iterator[OutputStream]:
        """Starts a request; leaving before its end cancels it.

        Args:
            request: What to generate.
            on_end: Called when the worker has ended it, or it was cut off.
            client: Who asks; empty if unknown.
            watch: Told of each message as it comes; None: nobody asked.

        Raises:
            LoaderdError: The worker has ended, or the request is nested too deep.
        """
        if self._failure is not None:
            raise self._failure
        key = next(self._keys)
        generate = worker_pb2.Generate(
            key=key, request=request, client=client, trace=_trace_context()
        )
        command = _readable(generate=generate)
        stream = self._streams[key] = OutputStream(self._max_stream_bytes, on_end, watch)
        self._commands.put_nowait(command)
        try:
            yield stream
        finally:
            self._cancel(key)

    async def call(self, call: worker_pb2.Call, on_end: Callable[[], None]) -> worker_pb2.Reply:
        """Sends tokenizer work and waits for its answer.

        Args:
            call: What to do.
            on_end: Called when the worker has answered; cancelling the wait does not stop it.

        Raises:
            LoaderdError: The call failed, it is nested too deep, or the worker ended.
        """
        call.key = next(self._keys)
        try:
            if self._failure is not None:
                raise self._failure
            command = _readable(call=call)
        except LoaderdError:
            on_end()
            raise
        answer: asyncio.Future[worker_pb2.Reply] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: on_end())
        self._calls[call.key] = answer
        self._commands.put_nowait(command)
        reply = await asyncio.shield(answer)
        if reply.HasField("error"):
            raise error_from(reply.error)
        return reply

    async def commands(self) -> AsyncIterator[worker_pb2.AttachResponse]:
        """The commands to send, as they come, until the last one."""
        while (command := await self._commands.get()) is not None:
            yield command

    def receive(self, event: worker_pb2.AttachRequest) -> None:
        """Takes one event of the worker to whom it concerns."""
        self.last_seen = time.monotonic()
        match event.WhichOneof("event"):
            case "heartbeat":
                self.memory_bytes = event.heartbeat.memory_bytes
                self.own_bytes = event.heartbeat.own_bytes
            case "step":
                outputs: dict[int, list[worker_pb2.Output]] = {}
                for output in event.step.outputs:
                    if output.HasField("report"):
                        self.engine.note(output.report)
                    else:
                        outputs.setdefault(output.key, []).append(output)
                for key, own in outputs.items():
                    self._deliver(key, own)
            case "reply":
                answer = self._calls.pop(event.reply.key, None)
                if answer is not None and not answer.done():
                    answer.set_result(event.reply)
            case "standby" if not self.standby.done():
                self.standby.set_result(event.standby)
            case "loaded" if not self.loaded.done():
                self.loaded.set_result(event.loaded)
            case "load_failed" if not self.loaded.done():
                self.loaded.set_exception(error_from(event.load_failed.error))

    def fail(self, error: LoaderdError) -> None:
        """Ends everything that waits on the worker with `error`, now and later."""
        if self._failure is not None:
            return
        self._failure = error
        for stream in self._streams.values():
            stream.fail(error)
        waits: list[asyncio.Future[Any]] = [self.standby, self.loaded, *self._calls.values()]
        for future in waits:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: it may be that nobody waits for it

    def _deliver(self, key: int, outputs: list[worker_pb2.Output]) -> None:
        last = outputs[-1]
        is_over = last.WhichOneof("event") in {"finished", "error"}
        stream = self._streams.pop(key, None) if is_over else self._streams.get(key)
        if stream is None:
            return  # its client has left
        messages = []
        for output in outputs:
            kind = output.WhichOneof("event")
            if kind is not None and kind != "error":
                message = generation_pb2.StreamGenerateResponse()
                getattr(message, kind).CopyFrom(getattr(output, kind))
                messages.append(message)
        stream.put(*messages)
        if last.HasField("error"):
            stream.fail(error_from(last.error))
        if stream.ended:  # at its end; or cut off, because its reader is too slow
            self._cancel(key)

    def _cancel(self, key: int) -> None:
        """Tells the worker to stop a request that it has not ended yet."""
        if self._streams.pop(key, None) is not None:
            cancel = worker_pb2.Cancel(key=key)
            self._commands.put_nowait(worker_pb2.AttachResponse(cancel=cancel))


def error_from(error: worker_pb2.Error) -> LoaderdError:
    """The domain error that a worker described."""
    return LoaderdError.from_metadata(error.reason, dict(error.metadata))


def _readable(**kind: worker_pb2.Generate | worker_pb2.Call) -> worker_pb2.AttachResponse:
    """A command that the worker can read; one that it cannot read would end its stream.

    The daemon could read the client's request, but in a command it lies two messages deeper.

    Raises:
        InvalidArgumentError: Its messages are nested deeper than protobuf reads.
    """
    try:
        command = worker_pb2.AttachResponse(**kind)  # type: ignore[arg-type]  # one of two names
        return worker_pb2.AttachResponse.FromString(command.SerializeToString())
    except DecodeError as error:
        raise InvalidArgumentError("request", "is nested too deep") from error


def _trace_context() -> worker_pb2.TraceContext | None:
    """The trace that a command is a part of; None: it is of none."""
    span = current()
    return None if span is None else worker_pb2.TraceContext(**span.ids)
