"""From the arguments of SDK calls to the requests of loaderd.v1. Shared by both clients."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration

from loaderd.client.errors import InvalidArgumentError, InvalidNameError
from loaderd.client.parameters import GenerationParameters, Seconds
from loaderd.client.types import Dtype, DtypeName, Message
from loaderd.v1 import generation_pb2, model_pb2

ModelName: TypeAlias = str | os.PathLike[str]
"""`org/name`, `org/name@revision`, a model's id, or the path of a local folder."""

ChatMessages: TypeAlias = Sequence[Message | Mapping[str, str]]
"""A chat, oldest first: `Message`s, or mappings with "role" and "content"."""

Setter: TypeAlias = Callable[[Any, str, Any], None]

GenerationRequest = TypeVar(
    "GenerationRequest", generation_pb2.GenerateRequest, generation_pb2.StreamGenerateRequest
)


def model_name(name: ModelName) -> str:
    """The name as the daemon wants it: a local path is made absolute, all else is left alone.

    A string is a path when it starts with `.`, `~` or `/`; a `Path` always is one.

    Raises:
        InvalidNameError: The path starts with `~user` and there is no such user.
    """
    text = os.fspath(name)
    if isinstance(name, str) and not name.startswith((".", "~", "/")):
        return text
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidNameError.of("model", f"{text!r} names no home folder") from error
    return os.path.abspath(path)  # noqa: PTH100  # drops "..", which Path.absolute() keeps


def load_request(
    name: ModelName, *, dtype: Dtype | DtypeName | None, device_map: str | None
) -> model_pb2.LoadModelRequest:
    """A LoadModelRequest; options that are None stay unset."""
    options = model_pb2.LoadOptions(device_map=device_map)
    if dtype is not None:
        options.dtype = model_pb2.Dtype.ValueType(_dtype(dtype))
    return model_pb2.LoadModelRequest(model=model_name(name), options=options)


def generation_request(
    kind: type[GenerationRequest],
    model_id: str,
    *,
    text: str | None,
    messages: ChatMessages | None,
    token_ids: Sequence[int] | None,
    parameters: GenerationParameters,
) -> GenerationRequest:
    """A request to generate.

    Raises:
        TypeError: A parameter does not exist, or its value has the wrong type.
        InvalidArgumentError: Not exactly one input, or a value that the wire cannot carry.
    """
    _require_one(text=text, messages=messages, token_ids=token_ids)
    request = kind(model=model_id)
    if text is not None:
        _set(request, "text", text)
    if messages is not None:
        request.messages.messages.extend(chat_messages(messages))
        request.messages.SetInParent()
    if token_ids is not None:
        _set(request, "token_ids", token_ids)
    for name, value in parameters.items():
        if name not in GenerationParameters.__annotations__:
            raise TypeError(f"no generation parameter is called {name!r}{_suggestion(name)}")
        if value is not None:
            _set(request, name, value)
    return request


def tokenize_request(
    model_id: str,
    *,
    text: str | None,
    messages: ChatMessages | None,
    add_special_tokens: bool | None,
) -> generation_pb2.TokenizeRequest:
    """A TokenizeRequest.

    Raises:
        InvalidArgumentError: Not exactly one input.
    """
    _require_one(text=text, messages=messages)
    request = generation_pb2.TokenizeRequest(model=model_id, add_special_tokens=add_special_tokens)
    if text is not None:
        request.text = text
    if messages is not None:
        request.messages.messages.extend(chat_messages(messages))
        request.messages.SetInParent()
    return request


def chat_messages(messages: ChatMessages) -> list[generation_pb2.ChatMessage]:
    """The messages of a chat.

    Raises:
        TypeError: Something in it is neither a `Message` nor a mapping.
        InvalidArgumentError: A mapping has other keys than "role" and "content".
    """
    return [_chat_message(index, message) for index, message in enumerate(messages)]


def _chat_message(index: int, message: Message | Mapping[str, str]) -> generation_pb2.ChatMessage:
    if isinstance(message, Message):
        return generation_pb2.ChatMessage(role=message.role, content=message.content)
    if not isinstance(message, Mapping):
        raise TypeError(
            f"messages[{index}] is a {type(message).__name__}, not a Message or a mapping "
            'with "role" and "content"'
        )
    if set(message) != {"role", "content"}:
        keys = ", ".join(map(repr, message)) or "none"
        raise InvalidArgumentError.of(
            f"messages[{index}]", f'the keys must be "role" and "content", not {keys}'
        )
    return generation_pb2.ChatMessage(role=message["role"], content=message["content"])


def _dtype(value: Dtype | str) -> Dtype:
    if isinstance(value, Dtype):
        return value
    names = [dtype.name.lower() for dtype in Dtype if dtype is not Dtype.UNSPECIFIED]
    if value not in names:
        raise InvalidArgumentError.of("dtype", f"{value!r} is none of {', '.join(names)}")
    return Dtype[value.upper()]


def _duration(value: Seconds) -> Duration:
    duration = Duration()
    duration.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    return duration


def _require_one(**inputs: object) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise InvalidArgumentError.of(
            "input", f"give exactly one of {', '.join(inputs)}, not {' and '.join(given) or 'none'}"
        )


def _set(request: Any, name: str, value: Any) -> None:
    """Sets one field; what protobuf has against a value names the field.

    Raises:
        TypeError: The value has the wrong type.
        InvalidArgumentError: The value is out of the range that the wire can carry.
    """
    setter: Setter = _SETTERS.get(name, setattr)
    try:
        setter(request, name, value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError.of(name, str(error)) from error


def _set_strings(request: Any, name: str, value: Sequence[str] | str) -> None:
    getattr(request, name).extend([value] if isinstance(value, str) else value)


def _set_numbers(request: Any, name: str, value: Sequence[int]) -> None:
    getattr(request, name).extend(value)


def _set_token_ids(request: Any, name: str, value: Sequence[int]) -> None:
    getattr(request, name).ids.extend(value)
    getattr(request, name).SetInParent()


def _set_mapping(request: Any, name: str, value: Mapping[Any, Any]) -> None:
    getattr(request, name).update(value)


def _set_duration(request: Any, name: str, value: Seconds) -> None:
    getattr(request, name).CopyFrom(_duration(value))


_SETTERS: dict[str, Setter] = {
    "stop": _set_strings,
    "bad_words": _set_strings,
    "stop_token_ids": _set_numbers,
    "token_ids": _set_token_ids,
    "allowed_token_ids": _set_token_ids,
    "logit_bias": _set_mapping,
    "chat_template_kwargs": _set_mapping,
    "keep_alive": _set_duration,
    "max_time": _set_duration,
}
"""How to set the fields that are no scalars; the others are assigned."""


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, GenerationParameters.__annotations__, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
