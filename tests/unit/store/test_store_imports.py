"""The daemon's process stays free of hub code: that runs in the child."""

from __future__ import annotations

import subprocess
import sys


def test_the_store_does_not_bring_the_hub_library_into_the_daemon() -> None:
    program = "import loaderd.server.store.store, sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stdout.splitlines())
    assert "loaderd.server.store.store" in modules
    assert not modules & {"huggingface_hub", "httpx2", "torch", "grpc"}
