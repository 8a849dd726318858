"""A daemon in a process of its own, as users have it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

START_S = 60
STOP_S = 60


class SpawnedDaemon:
    """`loaderd` with its own cache, on a free port of 127.0.0.1.

    Args:
        folder: Where its cache and its log go.
        arguments: Further command line.
        environment: Further variables.
        wrapper: A command that runs another one, such as `unshare`.

    Attributes:
        address: Where it listens.
        http_url: Where it listens for HTTP; empty if it does not.
        process: The process.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.cache_dir = folder / "home" / "hub"
        self.log_path = folder / "daemon.log"
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LOADERD_", "HF_", "HUGGING"))
        }
        variables |= {"HF_HOME": str(folder / "home"), "LOADERD_LOG_LEVEL": "debug"}
        variables |= environment or {}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *wrapper,
                    *(sys.executable, "-m", "loaderd.server.cli", "--port", "0", *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                text=True,
            )
        try:
            self.ready_line = self._first_line()
        except BaseException:
            self.process.kill()
            raise
        *_, self.address = words = self.ready_line.split()
        self.http_url = next((word for word in words if word.startswith("http://")), "")

    def __enter__(self) -> SpawnedDaemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What it has written to standard error, its workers' included."""
        return self.log_path.read_text()

    @property
    def rss_bytes(self) -> int:
        """Its resident memory, without its workers'."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "loaderd.server.worker" in _command(each)]

    def download_children(self) -> list[psutil.Process]:
        """Its processes that ask the hub, as far as they are alive."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if _is_download_child(each)]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def _first_line(self) -> str:
        lines: queue.Queue[str] = queue.Queue()
        stdout = self.process.stdout
        if stdout is None:
            raise RuntimeError("no pipe")
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        line = lines.get(timeout=START_S)
        if not line:
            raise RuntimeError(f"the daemon did not start: {self.log}")
        return line.strip()


def _is_download_child(process: psutil.Process) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and "loaderd.server.store.hub_child" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    """Its words; none of one that is gone by now, or ends."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
