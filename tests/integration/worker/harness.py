"""The daemon's end of a worker, as small as it can be: a real process on a real link."""

from __future__ import annotations

import itertools
import os
import queue
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from loaderd.v1 import generation_pb2, model_pb2
from loaderd.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.unit.worker.outputs import Outputs

TIMEOUT = 60.0


class LinkServer(worker_pb2_grpc.WorkerLinkServiceServicer):
    """Accepts one worker."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder / 'link.sock'}"
        self.events: queue.SimpleQueue[worker_pb2.AttachRequest] = queue.SimpleQueue()
        self.commands: queue.SimpleQueue[worker_pb2.AttachResponse | None] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(4))
        worker_pb2_grpc.add_WorkerLinkServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()
        self._readers = ThreadPoolExecutor(1)

    def Attach(  # noqa: N802 - the name in the protocol
        self,
        request_iterator: Iterator[worker_pb2.AttachRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[worker_pb2.AttachResponse]:
        def read() -> None:
            try:
                for event in request_iterator:
                    self.events.put(event)
            except grpc.RpcError:
                pass  # the worker is gone
            finally:
                self.commands.put(None)

        self._readers.submit(read)
        yield from iter(self.commands.get, None)

    def stop(self) -> None:
        self.commands.put(None)
        self._server.stop(grace=0).wait(TIMEOUT)


class Worker:
    """A worker process and what it has said.

    Args:
        folder: For the socket and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self.details = model_pb2.ModelDetails()
        self.heartbeats: list[worker_pb2.Heartbeat] = []
        self.server = LinkServer(folder)
        self._log = (folder / "worker.log").open("w+")
        self._keys = itertools.count(1)
        self._outputs: dict[int, Outputs] = {}
        self.reports: list[worker_pb2.EngineReport] = []
        self._replies: dict[int, worker_pb2.Reply] = {}
        self.process = subprocess.Popen(
            [*COMMAND, "--link", self.server.address, "--id", "w1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdin is not None
        self.stdin = self.process.stdin
        self.stdin.write(self.token.encode() + b"\n")
        self.stdin.flush()

    @property
    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.stdin.close()
        self.server.stop()
        self._log.close()

    def send(self, **command: Any) -> None:
        self.server.commands.put(worker_pb2.AttachResponse(**command))

    def expect(self, kind: str) -> Any:
        """The next event of this kind; outputs and replies of others are kept."""
        while True:
            event = self.server.events.get(timeout=TIMEOUT)
            found = event.WhichOneof("event")
            if found == "heartbeat":
                self.heartbeats.append(event.heartbeat)
            elif found == "step":
                for output in event.step.outputs:
                    if output.HasField("report"):
                        self.reports.append(output.report)
                    else:
                        self._outputs[output.key].add(output)
            elif found == "reply":
                self._replies[event.reply.key] = event.reply
            if found == kind:
                return getattr(event, kind)
            assert found not in {"loaded", "load_failed"}, event

    def load(self, path: Path, **options: Any) -> model_pb2.ModelDetails:
        self.send_load(path, **options)
        self.details = self.expect("loaded").details
        return self.details

    def load_error(self, path: Path, **options: Any) -> worker_pb2.Error:
        self.send_load(path, **options)
        error: worker_pb2.Error = self.expect("load_failed").error
        return error

    def send_load(
        self,
        path: Path,
        *,
        allow_pickle: bool = False,
        weight_room: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        load = worker_pb2.Load(
            path=str(path),
            model="org/name",
            options=model_pb2.LoadOptions(**options),
            allow_pickle=allow_pickle,
            weight_room=weight_room or {},
        )
        self.send(load=load)

    def start(self, **request: Any) -> int:
        """Starts a generation request; its key."""
        key = next(self._keys)
        self._outputs[key] = Outputs()
        asked = generation_pb2.StreamGenerateRequest(
            model="org/name", request_id=f"r{key}", **request
        )
        self.send(generate=worker_pb2.Generate(key=key, request=asked))
        return key

    def cancel(self, key: int) -> None:
        self.send(cancel=worker_pb2.Cancel(key=key))

    def wait_for_delta(self, key: int) -> None:
        while not self._outputs[key].deltas:
            self.expect("step")

    def outputs(self, key: int) -> Outputs:
        """All outputs of a request, once it has ended."""
        while not self._outputs[key].ended:
            self.expect("step")
        return self._outputs[key]

    def has_ended(self, key: int) -> bool:
        return self._outputs[key].ended

    def generate(self, **request: Any) -> Outputs:
        return self.outputs(self.start(**request))

    def call(self, **request: Any) -> worker_pb2.Reply:
        key = next(self._keys)
        self.send(call=worker_pb2.Call(key=key, **request))
        while key not in self._replies:
            self.expect("reply")
        return self._replies[key]


COMMAND = [sys.executable, "-P", "-m", "loaderd.server.worker"]
