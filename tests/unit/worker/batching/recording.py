"""What stands in for CUDA's recordings on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loaderd.server.worker.engine.batching.static_step import CaptureError

_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
"""Operators whose results or shapes the host would wait for."""


class Repeating:
    """Does the same work again, Python and all."""

    def __init__(self, *_: Any) -> None:
        self.captured = self.replayed = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        again = self._again(work)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            again()

        return replay

    def _again(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


class Recording(Repeating):
    """As CUDA does it: operators on tensors in their places are done again, and no Python is."""

    def _again(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        recorder = _Recorder()
        try:
            with recorder:
                work()
        except Exception as error:
            raise CaptureError(str(error)) from error
        return recorder.replay


class Failing(Repeating):
    """Records so many times, and never again."""

    def __init__(self, successes: int = 0) -> None:
        super().__init__()
        self.successes = successes
        self.tried = 0

    def _again(self, work: Callable[[], None]) -> Callable[[], None]:
        self.tried += 1
        if self.tried > self.successes:
            raise CaptureError("out of memory")
        return super()._again(work)


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator in _WAITING:
            raise RuntimeError(f"{operator} waits for the device")
        outputs = operator(*args, **kwargs or {})
        self._calls.append((operator, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        for operator, args, kwargs, outputs in self._calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
