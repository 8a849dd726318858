"""`python -m loaderd.cli` is `loaderctl`."""

from loaderd.cli.main import main

main()
