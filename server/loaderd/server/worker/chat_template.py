"""Messages to a prompt, by the model's chat template: a program that came with the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import jinja2
from google.protobuf.struct_pb2 import Struct

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker import template_variables
from loaderd.v1.generation_pb2 import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_SECONDS = 5.0
_MAX_CHARACTERS = 4 * 1024 * 1024
_FIELD = "messages"
_CODE_OF_TEMPLATES = ("<template>", str(Path(jinja2.__file__).parent))


class _TimeLimitError(Exception):
    """The template ran for too long."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    variables: Struct,
) -> str:
    """Renders a chat, in transformers' sandbox and within limits of time and size.

    Args:
        tokenizer: Of the loaded model.
        messages: The chat, oldest first.
        add_generation_prompt: Whether the prompt opens the assistant's turn.
        variables: What else the template reads, see `template_variables`.

    Raises:
        InvalidArgumentError: The messages or variables are malformed, or the template refuses
            them.
        UnsupportedOptionError: The model has no chat template, it exceeds its limits, or it does
            not read one of the variables.
    """
    if not messages:
        raise InvalidArgumentError(_FIELD, "give at least one")
    if not all(message.role for message in messages):
        raise InvalidArgumentError(_FIELD, "each message needs a role")
    if tokenizer.chat_template is None:
        raise UnsupportedOptionError(
            _FIELD, "the model has no chat template; use text or token_ids"
        )
    chat = [{"role": message.role, "content": message.content} for message in messages]
    more = template_variables.plain(variables)
    try:
        with _time_limit(_MAX_SECONDS):
            if more:
                template_variables.check_read(tokenizer, more)
            text: str = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
    except UnsupportedOptionError:
        raise
    except (_TimeLimitError, MemoryError):
        text = ""
        too_much = True
    except Exception as error:  # whatever a template's author makes it raise
        check = "their roles and order" + (f", and {template_variables.FIELD}" if more else "")
        raise InvalidArgumentError(
            _FIELD, f"the model's chat template refuses them; check {check}"
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
    """Ends a template that runs in this thread for longer, at the line that it has come to.

    Only in code of the template and of jinja2: Python swallows what is raised in a finalizer or
    in a callback of the garbage collector, which run in between, and traces no further then.
    """
    deadline = time.monotonic() + seconds

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_CODE_OF_TEMPLATES):
            return None
        if time.monotonic() > deadline:
            raise _TimeLimitError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
