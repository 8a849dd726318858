"""Errors on their way to the daemon."""

from __future__ import annotations

import logging
import secrets
import traceback

from loaderd.server.errors import InternalError, LoaderdError
from loaderd.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)


def error_message(error: LoaderdError) -> worker_pb2.Error:
    """A domain error as the link carries it."""
    return worker_pb2.Error(reason=error.number, metadata=error.metadata)


def incident(error: BaseException, doing: str, *, quotes_prompts: bool = True) -> InternalError:
    """Logs an unexpected error under a new number and gives the domain error that tells it.

    Args:
        error: The error.
        doing: What failed, for the log.
        quotes_prompts: Whether the exceptions' texts may quote prompts; the log then has their
            types and the lines of code only.
    """
    number = secrets.token_hex(6)
    told = _without_texts(error) if quotes_prompts else "".join(traceback.format_exception(error))
    logger.error("incident %s while %s:\n%s", number, doing, told)
    return InternalError(incident=number)


def _without_texts(error: BaseException) -> str:
    chain: list[str] = []
    current: BaseException | None = error
    while current is not None:
        frames = "".join(traceback.format_tb(current.__traceback__))
        chain.append(f"{frames}{type(current).__module__}.{type(current).__qualname__}")
        current = current.__cause__ or current.__context__
    return "\n--- caused by:\n".join(chain)
