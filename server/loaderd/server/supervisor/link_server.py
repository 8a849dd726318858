"""The private socket that workers attach to."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from loaderd.server.supervisor.link import WorkerLink
from loaderd.worker.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A debugger may stop a worker for long: the daemon's heartbeat decides, not HTTP/2 pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
)


class LinkServer(worker_pb2_grpc.WorkerLinkServiceServicer):
    """Accepts the workers that the daemon launched, and no others.

    Args:
        folder: The daemon's private folder; the socket is made in it.
    """

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder / 'workers.sock'}"
        self._expected: dict[str, tuple[str, WorkerLink]] = {}
        self._server = grpc.aio.server(options=_OPTIONS)
        worker_pb2_grpc.add_WorkerLinkServiceServicer_to_server(self, self._server)

    async def start(self) -> None:
        """Listens."""
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def close(self) -> None:
        """Cuts all links; the workers end."""
        await self._server.stop(grace=0)

    def expect(self, worker_id: str, token: str, link: WorkerLink) -> None:
        """Lets the worker with this id and token attach, once, to `link`."""
        self._expected[worker_id] = (token, link)

    def forget(self, worker_id: str) -> None:
        """Takes `expect` back."""
        self._expected.pop(worker_id, None)

    async def Attach(  # noqa: N802 - the name in the protocol
        self,
        request_iterator: AsyncIterator[worker_pb2.AttachRequest],
        context: grpc.aio.ServicerContext[worker_pb2.AttachRequest, worker_pb2.AttachResponse],
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        """Serves one worker for its whole life."""
        first = await anext(aiter(request_iterator), worker_pb2.AttachRequest())
        token, link = self._expected.get(first.hello.worker_id, ("", None))
        if link is None or not hmac.compare_digest(token, first.hello.token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not a worker of this daemon")
            return
        self.forget(first.hello.worker_id)
        reader = asyncio.create_task(_receive_all(request_iterator, link))
        # Deaf, the daemon could not keep the worker's streams alive.
        reader.add_done_callback(lambda _: link.hang_up())
        try:
            async for command in link.commands():
                yield command
        finally:
            reader.cancel()


async def _receive_all(events: AsyncIterator[worker_pb2.AttachRequest], link: WorkerLink) -> None:
    try:
        async for event in events:
            link.receive(event)
    except Exception:
        logger.exception("a worker's event could not be understood; the worker is ended")
