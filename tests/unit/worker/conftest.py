from __future__ import annotations

import pytest

from loaderd.server.worker.engine.batching.native.compiler import NotCompiledError
from loaderd.server.worker.engine.batching.native.kernels import Kernels, kernels_of_this_cpu


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Ours, where they can be compiled."""
    try:
        return kernels_of_this_cpu()
    except NotCompiledError as error:
        pytest.skip(str(error))
