"""Entry point of `python -m loaderd.server.worker`."""

from loaderd.server.worker.main import main

main()
