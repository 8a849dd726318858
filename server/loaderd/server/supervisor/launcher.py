"""How worker processes are started. Nothing above this package assumes that they are local."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Protocol, cast

from loaderd.server.logs.children import ChildLog

_OPENMP_WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
_SPIN_COUNT = "10000"
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
_SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
)


class WorkerProcess(Protocol):
    """A started worker."""

    @property
    def pid(self) -> int:
        """Its process id, where it runs."""

    async def wait(self) -> int:
        """Waits for its end; its exit code, negative for a signal."""

    def serves(self, model: str) -> None:
        """Tells whose lines in the log those of this worker are from now on."""

    def kill(self) -> None:
        """Ends it at once; nothing happens if it has ended."""


class WorkerLauncher(Protocol):
    """Starts workers."""

    async def launch(self, worker_id: str, token: str, link: str) -> WorkerProcess:
        """Starts a worker that will attach to `link` with this id and token.

        Raises:
            OSError: It could not be started.
        """


class LocalProcess:
    """A worker in a process of this box, ended when its standard input closes."""

    def __init__(self, process: asyncio.subprocess.Process, log: ChildLog) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits for its end; its exit code, negative for a signal."""
        code = await self._process.wait()
        self._log.take()  # its last words come before what the daemon says of its end
        return code

    def serves(self, model: str) -> None:
        """Has its lines in the log name the model."""
        self._log.fields["model"] = model

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        if self._process.returncode is None:
            self._process.kill()


class LocalLauncher:
    """Starts workers as child processes: exec, never a fork of the daemon's state."""

    async def launch(self, worker_id: str, token: str, link: str) -> LocalProcess:
        """Starts a worker; the token goes through its standard input, which stays open."""
        log = ChildLog()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the daemon's working folder is no place to import from
                "-m",
                "loaderd.server.worker",
                "--link",
                link,
                "--id",
                worker_id,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log.stderr,
                env=worker_environment(),
            )
        finally:
            log.begun()
        log.fields["worker"] = process.pid
        stdin = cast(asyncio.StreamWriter, process.stdin)  # there, because it is a pipe
        stdin.write(token.encode() + b"\n")
        return LocalProcess(process, log)


def worker_environment() -> dict[str, str]:
    """The daemon's environment without its secrets: workers ask neither the hub nor the collector.

    GNU OpenMP's threads, which torch computes with, spin for long where they wait for each other.
    On a box that does other work too they take the core that the last one needs, which made
    generation 30 times slower; a tenth of a millisecond of spinning costs little on either box
    (docs/performance.md).

    oneDNN and torch keep a compiled kernel, about a megabyte, for each shape that was multiplied in
    16 bits, a thousand of them. Steps have as many shapes as rows, and come back to few of them.

    The operator's own settings win.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    if not _OPENMP_WAITING & environment.keys():
        environment["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return (
        _KERNEL_CACHES
        | environment
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "PYTHONUNBUFFERED": "1",
        }
    )
