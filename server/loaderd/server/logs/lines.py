"""The lines of the log, for people and for programs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal, TextIO

from loaderd.server.logs.call import bound
from loaderd.server.tracing.spans import current

FIELDS = (
    "request_id",
    "client",
    "peer",
    "method",
    "model",
    "worker",
    "code",
    "reason",
    "duration",
    "trace_id",
    "span_id",
)
"""What a line may have beside its message, in their order: `extra` of the call that logs it, or
bound to its task; the last two are those of its span."""

_CHATTY_LIBRARIES = ("asyncio", "grpc", "httpx2", "filelock", "uvicorn")
_LONGEST_FIELD = 256  # a model's name, for one, is what a client sent


class TextFormatter(logging.Formatter):
    """One line for people; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        head = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"
        fields = " ".join(f"{name}={_shown(value)}" for name, value in fields_of(record).items())
        traceback = exception_of(self, record)
        return f"{head}{' [' + fields + ']' if fields else ''}{traceback and chr(10) + traceback}"


class JsonFormatter(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if traceback := exception_of(self, record):
            line["exception"] = traceback
        return json.dumps(line, default=str, separators=(",", ":"))


def log_to(stream: TextIO, line_format: Literal["text", "json"], level: str) -> None:
    """Sends all that the process logs to a stream, warnings included.

    Args:
        stream: Where to.
        line_format: What the lines are.
        level: The least that is told.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if line_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    for library in _CHATTY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """The fields of a line that are known."""
    span = current()
    given = {**(span.ids if span is not None else {}), **bound(), **vars(record)}
    found = ((name, given.get(name)) for name in FIELDS)
    return {name: _shortened(value) for name, value in found if value not in (None, "")}


def exception_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a line; empty if it has none."""
    if record.exc_info and not record.exc_text:
        record.exc_text = formatter.formatException(record.exc_info)
    return record.exc_text or ""


def _time(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shortened(value: object) -> object:
    return value[:_LONGEST_FIELD] if isinstance(value, str) else value


def _shown(value: object) -> str:
    """A value in a line for people: quoted where it could pass for something else."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "=[]')
    return text if plain else json.dumps(text)
