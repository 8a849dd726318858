"""Serves folders as repositories until it is told to end; prints its URL when it is ready."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from tests.hub import Hub, HubRepo, faults


def _repo(text: str) -> HubRepo:
    repo_id, separator, folder = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=PATH")
    try:
        return HubRepo.from_folder(repo_id, Path(folder))
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument(
        "--repo", type=_repo, action="append", required=True, metavar="ID=PATH", dest="repos"
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--bytes-per-second", type=float, help="all downloads together")
    args = parser.parse_args()

    # Before anybody can see the URL; otherwise a signal could come too early.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    hub = Hub(*args.repos, port=args.port)
    if args.bytes_per_second:
        hub.inject(faults.throttle(args.bytes_per_second))
    with hub:
        print(hub.url, flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
