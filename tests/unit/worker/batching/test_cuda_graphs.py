from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching.cuda_graphs import CudaGraphs
from loaderd.server.worker.engine.batching.static_step import CaptureError

DEVICE = torch.device("cuda", 0)


class Cuda:
    """What torch.cuda is asked to do, one word each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.sync_debug_mode: Any = 0
        self.stream: Any = "main"
        self.broken: Exception | None = None
        cuda = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == DEVICE

            def wait_stream(self, stream: object) -> None:
                cuda.calls.append("side waits")

        class Main:
            def wait_stream(self, stream: object) -> None:
                cuda.calls.append("main waits")

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                assert isinstance(cuda.stream, Stream)
                assert pool == "pool"
                assert capture_error_mode == "thread_local"
                cuda.calls.append("begin")

            def capture_end(self) -> None:
                assert isinstance(cuda.stream, Stream)
                cuda.calls.append("end")
                if cuda.calls[-2] == "failed":
                    raise RuntimeError("invalidated")

            def replay(self) -> None:
                cuda.calls.append("replay")

        @contextmanager
        def on(_device: torch.device) -> Iterator[None]:
            yield

        @contextmanager
        def stream(it: Stream) -> Iterator[None]:
            was, cuda.stream = cuda.stream, it
            try:
                yield
            finally:
                cuda.stream = was

        def synchronize(_device: object = None) -> None:
            if cuda.broken:
                raise cuda.broken
            cuda.calls.append("synchronize")

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: "pool",
            "device": on,
            "stream": stream,
            "current_stream": Main,
            "synchronize": synchronize,
            "get_sync_debug_mode": lambda: cuda.sync_debug_mode,
            "set_sync_debug_mode": lambda mode: setattr(cuda, "sync_debug_mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, fails: Callable[[], bool] = lambda: False) -> Callable[[], None]:
        def work() -> None:
            if fails():
                self.calls.append("failed")
                raise RuntimeError("no\nand why not")
            self.calls.append(f"work {self.sync_debug_mode}")

        return work


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


WARM_UP = ["side waits", "work 0", "work error"]


def test_work_is_done_aside_and_without_waiting_before_it_is_recorded(cuda: Cuda) -> None:
    replay = CudaGraphs(DEVICE).capture(cuda.work())
    recorded = [*WARM_UP, "synchronize", "begin", "work 0", "end", "main waits"]
    assert cuda.calls == recorded
    replay()
    assert cuda.calls == [*recorded, "replay"]


def test_work_that_waits_is_not_recorded(cuda: Cuda) -> None:
    work = cuda.work(lambda: cuda.sync_debug_mode == "error")
    with pytest.raises(CaptureError, match=r"^RuntimeError: no$"):
        CudaGraphs(DEVICE).capture(work)
    assert "begin" not in cuda.calls
    assert cuda.sync_debug_mode == 0


def test_a_recording_that_fails_ends(cuda: Cuda) -> None:
    work = cuda.work(lambda: cuda.calls[-1] == "begin")
    with pytest.raises(CaptureError, match=r"^RuntimeError: no$"):
        CudaGraphs(DEVICE).capture(work)
    assert cuda.calls[-4:] == ["begin", "failed", "end", "synchronize"]
    assert cuda.stream == "main"


def test_a_broken_device_is_told_as_such(cuda: Cuda) -> None:
    cuda.broken = torch.AcceleratorError("device-side assert")
    with pytest.raises(torch.AcceleratorError):
        CudaGraphs(DEVICE).capture(cuda.work())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_goes_on_after_work_that_waits_for_it() -> None:
    graphs = CudaGraphs(DEVICE)
    numbers = torch.ones(4, device=DEVICE)

    def add() -> None:
        numbers.add_(float(numbers.sum()))

    def fill() -> None:
        numbers.fill_(2.0)

    with pytest.raises(CaptureError, match="synchronizing"):
        graphs.capture(add)
    replay = graphs.capture(fill)
    numbers.zero_()
    replay()
    assert numbers.tolist() == [2.0] * 4
