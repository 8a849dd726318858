"""The download child: `python -m loaderd.server.store.hub_child`.

Hub code runs in a process of its own because the hub library has calls that never end, keeps
state from its import on, and handles what strangers send. One request comes on stdin, messages go
to stdout, log lines to stderr. The child ends when its parent does or closes stdin.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import BinaryIO

from loaderd.server.errors import LoaderdError
from loaderd.server.logs.children import log_to_daemon
from loaderd.server.parent import die_with_parent, exit_when_closed
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.confine import confine_writing
from loaderd.server.store.hub_access import HubAccess, domain_errors
from loaderd.server.store.hub_messages import (
    GO,
    Alive,
    Defect,
    Done,
    Message,
    Request,
    encode,
)
from loaderd.server.store.names import HubName


def main() -> None:
    """Does what the request says, then ends the process."""
    die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it reaches the whole group; the daemon decides
    output = _take_stdout()
    line = sys.stdin.buffer.readline()
    if not line:
        return  # the daemon is gone already
    request = Request.from_line(line)
    log_to_daemon()
    try:
        _confine(request)
        answer = _run(request, output)
    except LoaderdError as error:
        answer = error
    except Exception:
        answer = Defect(traceback.format_exc())
    _send(output, answer)
    # Threads of a download that failed may still wait for the hub; nobody waits for them.
    os._exit(0)


def _run(request: Request, output: BinaryIO) -> Message:
    from loaderd.server.store import hub

    def alive() -> None:
        _send(output, Alive())

    alive()
    name = HubName(request.repo_id, request.revision)
    cache_dir = Path(request.cache_dir)
    access = HubAccess(request.endpoint, request.token, request.retry)
    plan = hub.plan(
        name,
        cache_dir,
        access,
        alive,
        allow_pickle=request.allow_pickle,
        also=request.distrusted,  # a repair mends all that is bad, also what loading does not need
    )
    if request.operation == "plan":
        return plan
    _send(output, plan)
    _wait_for_go()
    downloaded = hub.download(
        plan,
        cache_dir,
        access,
        lambda progress: _send(output, progress),
        on_moved=alive,
        distrusted=request.distrusted,
    )
    return Done(plan.commit, downloaded.stamps)


def _wait_for_go() -> None:
    """Returns when the daemon admits the download; from then on the end of stdin is its end."""
    if sys.stdin.buffer.readline() != GO:
        os._exit(0)
    exit_when_closed(sys.stdin.fileno())


def _confine(request: Request) -> None:
    """A plan writes nothing, a download only into the cache."""
    folders: list[Path] = []
    if request.operation == "download":
        repo = RepoFolder(Path(request.cache_dir), request.repo_id)
        with domain_errors(HubName(request.repo_id, request.revision)):
            repo.cache_dir.mkdir(parents=True, exist_ok=True)
            # The operator may have moved a repository, or its blobs, to another disk.
            folders = [repo.cache_dir, *filter(Path.is_dir, (repo.path, repo.blobs))]
    confine_writing(folders)


def _take_stdout() -> BinaryIO:
    """Keeps stdout for messages: what libraries print goes to stderr."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return output


def _send(output: BinaryIO, message: Message) -> None:
    try:
        output.write(encode(message))
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
