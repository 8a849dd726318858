"""The worker's end of the stream to the daemon: events out, commands in."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil

from loaderd.server.box.cpu import own_bytes
from loaderd.worker.v1.worker_pb2 import AttachRequest, AttachResponse, Heartbeat, Hello
from loaderd.worker.v1.worker_pb2_grpc import WorkerLinkServiceStub

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # A daemon that is stopped for a while, say by a debugger, is not a dead one.
    ("grpc.keepalive_timeout_ms", 120_000),
    ("grpc.http2.ping_timeout_ms", 120_000),
)
_HEARTBEAT_SECONDS = 1.0
_CLOSE_SECONDS = 5.0


class Link:
    """The stream to the daemon, from `Hello` on.

    Args:
        address: Where the daemon listens, as gRPC writes it.
        worker_id: This worker's id.
        token: The secret that proves it.
    """

    def __init__(self, address: str, worker_id: str, token: str) -> None:
        self._events: queue.SimpleQueue[AttachRequest | None] = queue.SimpleQueue()
        self.send(hello=Hello(worker_id=worker_id, token=token))
        channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._call = WorkerLinkServiceStub(channel).Attach(iter(self._events.get, None))

    def send(self, **event: Any) -> None:
        """Sends an event, given by the name of its field; from any thread, never waits."""
        self._events.put(AttachRequest(**event))

    def commands(self) -> Iterator[AttachResponse]:
        """The daemon's commands as they come, until the stream ends."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            logger.warning("the link to the daemon ended: %s", error.code())

    def close(self) -> None:
        """Sends what is queued and ends the stream, soon."""
        self._events.put(None)
        timer = threading.Timer(_CLOSE_SECONDS, self._call.cancel)
        timer.daemon = True
        timer.start()


class HeartbeatThread(threading.Thread):
    """Tells the daemon every second that this process lives and what memory it holds.

    Attributes:
        accelerator_bytes: Tells the memory held on accelerators; set once torch is there.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.accelerator_bytes: Callable[[], int] = lambda: 0
        self._link = link
        self._process = psutil.Process()

    def run(self) -> None:
        """Beats."""
        while True:
            memory = self._process.memory_info().rss + self.accelerator_bytes()
            own = own_bytes(self._process)
            self._link.send(heartbeat=Heartbeat(memory_bytes=memory, own_bytes=own))
            time.sleep(_HEARTBEAT_SECONDS)
