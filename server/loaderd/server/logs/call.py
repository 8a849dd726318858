"""What the log's lines say of the call that they belong to."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

_MAX_REQUEST_ID = 128

_bound: ContextVar[Mapping[str, object]] = ContextVar("log_fields", default=MappingProxyType({}))


def bind(**fields: object) -> None:
    """Adds fields to all lines of this task, and of those that it starts from now on."""
    _bound.set({**_bound.get(), **fields})


def bound() -> Mapping[str, object]:
    """The fields of this task's lines."""
    return _bound.get()


def new_request_id() -> str:
    """An id for a call that came without one."""
    return secrets.token_hex(8)


def current_request_id() -> str:
    """The id of the call that is being served; a new one outside of calls."""
    return str(bound().get("request_id") or new_request_id())


def request_id_problem(request_id: str) -> str | None:
    """What is wrong with an id that a caller gave; None: nothing.

    It stands in log lines and in headers, so it must be short, and of one line.
    """
    if 0 < len(request_id) <= _MAX_REQUEST_ID and request_id.isascii() and request_id.isprintable():
        return None
    return f"must be 1 to {_MAX_REQUEST_ID} printable ASCII characters"
