"""Messages to a prompt, by the model's chat template: a program that came with the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.v1.generation_pb2 import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_MESSAGES = 1024
_MAX_SECONDS = 5.0
_MAX_CHARACTERS = 4 * 1024 * 1024
_FIELD = "messages"


class _TimeLimitError(Exception):
    """The template ran for too long."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
) -> str:
    """Renders a chat, in transformers' sandbox and within limits of time and size.

    Raises:
        InvalidArgumentError: The messages are malformed, or the template refuses them.
        UnsupportedOptionError: The model has no chat template, or it exceeds its limits.
    """
    if not 1 <= len(messages) <= _MAX_MESSAGES:
        raise InvalidArgumentError(_FIELD, f"from 1 to {_MAX_MESSAGES} messages")
    if not all(message.role for message in messages):
        raise InvalidArgumentError(_FIELD, "each message needs a role")
    if tokenizer.chat_template is None:
        raise UnsupportedOptionError(
            _FIELD, "the model has no chat template; use text or token_ids"
        )
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        with _time_limit(_MAX_SECONDS):
            text: str = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except (_TimeLimitError, MemoryError):
        text = ""
        too_much = True
    except Exception as error:  # whatever a template's author makes it raise
        raise InvalidArgumentError(
            _FIELD, "the model's chat template refuses them; check their roles and order"
        ) from error
    else:
        too_much = len(text) > _MAX_CHARACTERS
    if too_much:
        raise UnsupportedOptionError(
            _FIELD,
            f"the model's chat template exceeds {_MAX_SECONDS:g} seconds or "
            f"{_MAX_CHARACTERS} characters",
        )
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends Python code that runs in this thread for longer, at the line that it has come to."""
    deadline = time.monotonic() + seconds

    def trace(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise _TimeLimitError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
