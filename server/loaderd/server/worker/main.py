"""The worker process: attach to the daemon, import everything, do what the daemon commands."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from loaderd.server.logs.children import log_to_daemon
from loaderd.server.parent import die_with_parent, exit_when_closed
from loaderd.server.worker.link import HeartbeatThread, Link

if TYPE_CHECKING:
    from loaderd.server.worker.host import ModelHost

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs a worker; never returns."""
    arguments = _arguments()
    # These reach the whole group, from a terminal or a supervisor; the daemon decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    token = sys.stdin.buffer.readline().decode().strip()
    exit_when_closed(sys.stdin.fileno())
    _send_all_output_to_the_log()
    link = Link(arguments.link, arguments.id, token)
    run(link)
    _exit(0)


def run(link: Link) -> None:
    """Does what the daemon commands until it says to end, or the stream ends.

    Commands are read here, always, and done by one other thread in their order, so that a
    shutdown is heard while that thread imports, loads or tokenizes. Engines have their own.
    """
    work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="work")
    host = work.submit(_new_host, link)
    host.add_done_callback(_exit_if_failed)
    for command in link.commands():
        match command.WhichOneof("command"):
            case "shutdown":
                return
            case "load":
                work.submit(_do, host, "load", command.load)
            case "generate":
                work.submit(_do, host, "generate", command.generate, time.monotonic())
            case "call":
                work.submit(_do, host, "call", command.call)
            case "cancel":
                # At once for a request that runs; in its turn for one that is still prepared.
                if host.done():
                    _do(host, "cancel", command.cancel)
                work.submit(_do, host, "cancel", command.cancel)


def _do(host: Future[ModelHost], method: str, *arguments: Any) -> None:
    getattr(host.result(), method)(*arguments)


def _new_host(link: Link) -> ModelHost:
    heartbeat = HeartbeatThread(link)
    heartbeat.start()
    from loaderd.server.worker import devices
    from loaderd.server.worker.host import ModelHost
    from loaderd.server.worker.warm_up import warm_up

    heartbeat.accelerator_bytes = devices.allocated_bytes
    host = ModelHost(link)
    warm_up()
    # What there is by now stays: no collection need look through it, least of all while the many
    # small objects of a tokenizer are made.
    gc.collect()
    gc.freeze()
    host.stand_by()
    return host


def _exit_if_failed(host: Future[ModelHost]) -> None:
    error = host.exception()
    if error is not None:
        logger.error("the worker cannot start; is loaderd[server] installed whole?", exc_info=error)
        _exit(1)


def _send_all_output_to_the_log() -> None:
    """Standard error is the log; what libraries print goes there too."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    log_to_daemon()
    # transformers imports torchao where it is installed, which tells what it would need for a GPU.
    for chatty in ("py.warnings", "torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _exit(code: int) -> None:
    """Ends at once: native threads may be busy for long."""
    logging.shutdown()
    os._exit(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loaderd.server.worker",
        description="Holds one model for the daemon, which starts it. Not meant to be run by hand.",
    )
    parser.add_argument("--link", required=True, help="address of the daemon's socket")
    parser.add_argument("--id", required=True, help="this worker's id")
    return parser.parse_args()
