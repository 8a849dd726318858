"""CUDA's recordings of kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from loaderd.server.worker.engine.batching.static_step import CaptureError

# It says that it is new, and does not see everything.
warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)


class CudaGraphs:
    """`Graphs` of one device, which share their memory.

    They can, because only one runs at a time and none reads what another one left there.

    Args:
        device: A CUDA device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Always the same stream: libraries keep their workspaces by stream.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Graphs`."""
        try:
            return self._capture(work)
        except Exception as error:
            # CUDA tells of a failed recording as of a broken device; only that one fails here.
            torch.cuda.synchronize(self._device)
            text = str(error).partition("\n")[0]
            raise CaptureError(f"{type(error).__name__}: {text}") from error

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                # Once for all that is set up at a first use, and once to see that nothing waits
                # for the device: in a recording that would fail, and leave the allocator astray.
                work()
                with _no_waiting():
                    work()
                self._record(graph, work)
            caller.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        # Other threads may go on using CUDA meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except Exception:
            # The recording must end all the same; that it fails then is no news.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever waits for the device fails."""
    was = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(was)
