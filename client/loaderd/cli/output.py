"""Results to stdout, messages to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STALE = (
    "the hub did not answer or may not be asked; what the cache had is used, and may be out of date"
)
"""The message where a snapshot may be older than what its revision is now."""

_UNLIMITED = 1_000_000


def message(text: str) -> None:
    """Prints a message for people to stderr, under the program's name."""
    print(f"loaderctl: {text}", file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Prints a line of the result to stdout."""
    print(text, flush=True)


def json_result(value: object) -> None:
    """Prints the result as one JSON document."""
    result(json.dumps(plain(value), indent=2))


def json_line(value: object) -> None:
    """Prints one JSON document in one line."""
    result(json.dumps(plain(value)))


def plain(value: Any) -> Any:
    """The value in JSON's types.

    Dataclasses become objects with the names of their fields, enumerations their lower-case
    names, time spans seconds, and times ISO 8601 in UTC.
    """
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    match value:
        case Enum():
            return value.name.lower()
        case timedelta():
            return value.total_seconds()
        case datetime():
            return value.isoformat()
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None
) -> None:
    """Prints a table to stdout or `file`; where that is no terminal, as wide as it needs to be."""
    console(file).print(grid(columns, rows))


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table, for a `console`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def console(file: TextIO | None = None) -> Console:
    """What draws on stdout or `file`; where that is no terminal, no line is too long."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        result(f"{name:<{width}}  {value}".rstrip())
