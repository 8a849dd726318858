"""Asking before something is deleted."""

from __future__ import annotations

import sys

from loaderd.cli import output
from loaderd.cli.usage import UsageError


def require_consent(*, given: bool, json: bool) -> None:
    """Refuses to delete where nobody consented and nobody can be asked.

    Raises:
        UsageError: So.
    """
    if given or (sys.stdin.isatty() and sys.stderr.isatty() and not json):
        return
    where = "with --json" if json else "without a terminal to ask on"
    raise UsageError(f"give --yes to delete files {where}, or --dry-run to see what would go")


def is_confirmed(question: str) -> bool:
    """Asks on the terminal; everything but a yes is a no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)  # Ctrl-D leaves the cursor where it was
    if answer.strip().lower() in {"y", "yes"}:
        return True
    output.message("nothing was deleted")
    return False
