"""From the arguments of SDK calls to the requests of loaderd.v1. Shared by both clients."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from loaderd.client.errors import InvalidArgumentError, InvalidNameError
from loaderd.client.parameters import GenerationParameters, Seconds
from loaderd.client.types import (
    Dtype,
    DtypeName,
    Message,
    Offload,
    OffloadName,
    Quantization,
    QuantizationName,
)
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2

ModelName: TypeAlias = str | os.PathLike[str]
"""`org/name` or `name`, either with `@revision`, a model's id, or the path of a local folder."""

DeviceMap: TypeAlias = str | Mapping[str, str]
"""Where layers go: as a whole, such as "balanced" or "cuda:0", or the device of each module."""

ChatMessages: TypeAlias = Sequence[Message | Mapping[str, str]]
"""A chat, oldest first: `Message`s, or mappings with "role" and "content"."""

Setter: TypeAlias = Callable[[Any, str, Any], None]

Choice = TypeVar("Choice", Dtype, Quantization, Offload)

_NOT_UNICODE = "is not valid Unicode text"

_BOUNDS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
"""The whole numbers that a type of the wire takes."""

GenerationRequest = TypeVar(
    "GenerationRequest", generation_pb2.GenerateRequest, generation_pb2.StreamGenerateRequest
)


def model_name(name: ModelName) -> str:
    """The name as the daemon wants it: a local path is made absolute, all else is left alone.

    A string is a path when it starts with `.`, `~` or `/`; a `Path` always is one.

    Raises:
        InvalidNameError: It is not valid Unicode text, or a path that starts with `~user` and
            there is no such user.
    """
    text = os.fspath(name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidNameError.of("model", _NOT_UNICODE) from error
    if isinstance(name, str) and not name.startswith((".", "~", "/")):
        return text
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidNameError.of("model", f"{text!r} names no home folder") from error
    return os.path.abspath(path)  # noqa: PTH100  # drops "..", which Path.absolute() keeps


def load_request(
    name: ModelName,
    *,
    dtype: Dtype | DtypeName | None,
    device_map: DeviceMap | None,
    quantization: Quantization | QuantizationName | None = None,
    max_memory: Mapping[str, int] | None = None,
    offload: Offload | OffloadName | None = None,
    keep_alive: Seconds | None = None,
    lease_ttl: Seconds | None = None,
    replicas: int | None = None,
) -> model_pb2.LoadModelRequest:
    """A LoadModelRequest; options that are None stay unset.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    options = _load_options(dtype, device_map, quantization, max_memory, offload)
    request = model_pb2.LoadModelRequest(model=model_name(name), options=options)
    if keep_alive is not None:
        _set(request, "keep_alive", keep_alive)
    if lease_ttl is not None:
        _set(request, "lease_ttl", lease_ttl)
    if replicas is not None:
        _set(request, "replicas", replicas)
    return request


def plan_request(
    name: ModelName,
    *,
    dtype: Dtype | DtypeName | None,
    device_map: DeviceMap | None,
    quantization: Quantization | QuantizationName | None = None,
    max_memory: Mapping[str, int] | None = None,
    offload: Offload | OffloadName | None = None,
    replicas: int | None = None,
) -> model_pb2.PlanModelRequest:
    """A PlanModelRequest; options that are None stay unset.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    options = _load_options(dtype, device_map, quantization, max_memory, offload)
    request = model_pb2.PlanModelRequest(model=model_name(name), options=options)
    if replicas is not None:
        _set(request, "replicas", replicas)
    return request


def _load_options(
    dtype: Dtype | DtypeName | None,
    device_map: DeviceMap | None,
    quantization: Quantization | QuantizationName | None,
    max_memory: Mapping[str, int] | None,
    offload: Offload | OffloadName | None,
) -> model_pb2.LoadOptions:
    options = model_pb2.LoadOptions()
    if isinstance(device_map, Mapping):
        if not device_map:
            raise InvalidArgumentError.of("device_map", "names no module")
        _set(options, "module_map", device_map)
    elif device_map is not None:
        _set(options, "device_map", device_map)
    if dtype is not None:
        options.dtype = model_pb2.Dtype.ValueType(_member(Dtype, "dtype", dtype))
    if quantization is not None:
        options.quantization = model_pb2.Quantization.ValueType(
            _member(Quantization, "quantization", quantization)
        )
    if max_memory is not None:
        _set(options, "max_memory", max_memory)
    if offload is not None:
        options.offload = model_pb2.Offload.ValueType(_member(Offload, "offload", offload))
    return options


def unload_request(
    name: ModelName, *, force: bool, grace: Seconds | None
) -> model_pb2.UnloadModelRequest:
    """An UnloadModelRequest.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    request = model_pb2.UnloadModelRequest(model=model_name(name), force=force)
    if grace is not None:
        _set(request, "grace", grace)
    return request


def lease_request(model_id: str, ttl: Seconds) -> model_pb2.AcquireLeaseRequest:
    """An AcquireLeaseRequest.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    request = model_pb2.AcquireLeaseRequest(model=model_id)
    _set(request, "ttl", ttl)
    return request


def delete_request(
    names: Iterable[ModelName], *, dry_run: bool
) -> cache_pb2.DeleteSnapshotsRequest:
    """A DeleteSnapshotsRequest."""
    return cache_pb2.DeleteSnapshotsRequest(models=map(model_name, names), dry_run=dry_run)


def prune_request(
    *,
    orphans: bool,
    unreferenced: bool,
    unused_for: Seconds | None,
    max_bytes: int | None,
    dry_run: bool,
) -> cache_pb2.PruneCacheRequest:
    """A PruneCacheRequest; conditions that are None stay unset.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    request = cache_pb2.PruneCacheRequest(
        orphans=orphans, unreferenced=unreferenced, dry_run=dry_run
    )
    if unused_for is not None:
        _set(request, "unused_for", unused_for)
    if max_bytes is not None:
        _set(request, "max_bytes", max_bytes)
    return request


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
    chat_template_kwargs: Mapping[str, Any] | None,
) -> generation_pb2.TokenizeRequest:
    """A TokenizeRequest.

    Raises:
        InvalidArgumentError: Not exactly one input, or a value that the wire cannot carry.
    """
    _require_one(text=text, messages=messages)
    request = generation_pb2.TokenizeRequest(model=model_id, add_special_tokens=add_special_tokens)
    if text is not None:
        _set(request, "text", text)
    if messages is not None:
        request.messages.messages.extend(chat_messages(messages))
        request.messages.SetInParent()
    if chat_template_kwargs is not None:
        _set(request, "chat_template_kwargs", chat_template_kwargs)
    return request


def detokenize_request(
    model_id: str, token_ids: Sequence[int], skip_special_tokens: bool | None
) -> generation_pb2.DetokenizeRequest:
    """A DetokenizeRequest.

    Raises:
        InvalidArgumentError: A token id is out of the range that the wire can carry.
    """
    request = generation_pb2.DetokenizeRequest(
        model=model_id, skip_special_tokens=skip_special_tokens
    )
    _set(request, "token_ids", token_ids, setter=_set_numbers)
    return request


def apply_chat_template_request(
    model_id: str,
    messages: ChatMessages,
    *,
    add_generation_prompt: bool | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> generation_pb2.ApplyChatTemplateRequest:
    """An ApplyChatTemplateRequest.

    Raises:
        InvalidArgumentError: A value that the wire cannot carry.
    """
    request = generation_pb2.ApplyChatTemplateRequest(
        model=model_id,
        messages=chat_messages(messages),
        add_generation_prompt=add_generation_prompt,
    )
    if chat_template_kwargs is not None:
        _set(request, "chat_template_kwargs", chat_template_kwargs)
    return request


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    """A HealthCheckRequest.

    Raises:
        InvalidArgumentError: The name is not valid Unicode text.
    """
    request = health_pb2.HealthCheckRequest()
    _set(request, "service", service)
    return request


def chat_messages(messages: ChatMessages) -> list[generation_pb2.ChatMessage]:
    """The messages of a chat.

    Raises:
        TypeError: Something in it is neither a `Message` nor a mapping.
        InvalidArgumentError: A mapping has other keys than "role" and "content", or a value is
            not valid Unicode text.
    """
    return [_chat_message(index, message) for index, message in enumerate(messages)]


def _chat_message(index: int, message: Message | Mapping[str, str]) -> generation_pb2.ChatMessage:
    place = f"messages[{index}]"
    if isinstance(message, Message):
        message = {"role": message.role, "content": message.content}
    if not isinstance(message, Mapping):
        raise TypeError(
            f"{place} is a {type(message).__name__}, not a Message or a mapping "
            'with "role" and "content"'
        )
    for key in ("role", "content"):
        if key not in message:
            raise InvalidArgumentError.of(place, f'"{key}" is missing')
    request = generation_pb2.ChatMessage()
    for key, value in message.items():
        if key not in {"role", "content"}:
            raise InvalidArgumentError.of(place, f'has "role" and "content", and no {key!r}')
        _set(request, key, value, place=f"{place}.")
    return request


def _member(kind: type[Choice], argument: str, value: Choice | str) -> Choice:
    """The member that a name means."""
    if isinstance(value, kind):
        return value
    names = [member.name.lower() for member in kind if member]
    if value not in names:
        raise InvalidArgumentError.of(argument, f"{value!r} is none of {', '.join(names)}")
    return kind[str(value).upper()]


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


def _set(
    request: Any, name: str, value: Any, *, place: str = "", setter: Setter | None = None
) -> None:
    """Sets one field; what protobuf has against a value names the field, after its `place`.

    Raises:
        TypeError: The value has the wrong type.
        InvalidArgumentError: The wire cannot carry the value.
    """
    setter = setter or _SETTERS.get(name, setattr)
    try:
        setter(request, name, value)
    except TypeError as error:
        raise TypeError(f"{place}{name}: {error}") from error
    except UnicodeEncodeError as error:
        raise InvalidArgumentError.of(f"{place}{name}", _NOT_UNICODE) from error
    except (ValueError, OverflowError) as error:
        problem = _range_problem(request.DESCRIPTOR.fields_by_name[name]) or str(error)
        raise InvalidArgumentError.of(f"{place}{name}", problem) from error


def _range_problem(field: FieldDescriptor) -> str | None:
    """Which numbers a field of whole numbers, or a list or mapping of them, takes."""
    kind = field.message_type
    if kind is not None and kind.full_name == Duration.DESCRIPTOR.full_name:
        return "is no time span that a timedelta can hold"
    for number in kind.fields if kind is not None else [field]:
        if number.type in _BOUNDS:
            low, high = _BOUNDS[number.type]
            return f"must be from {low} to {high}"
    return None


def _set_strings(request: Any, name: str, value: Sequence[str] | str) -> None:
    getattr(request, name).extend([value] if isinstance(value, str) else value)


def _set_numbers(request: Any, name: str, value: Sequence[int]) -> None:
    getattr(request, name).extend(value)


def _set_token_ids(request: Any, name: str, value: Sequence[int]) -> None:
    getattr(request, name).ids.extend(value)
    getattr(request, name).SetInParent()


def _set_mapping(request: Any, name: str, value: Mapping[Any, Any]) -> None:
    getattr(request, name).update(value)


def _set_struct(request: Any, name: str, value: Mapping[str, Any]) -> None:
    try:
        getattr(request, name).update(value)
        type(request).FromString(request.SerializeToString())  # as the daemon will read it
    except (RecursionError, DecodeError) as error:
        raise ValueError("is nested too deep") from error


def _set_duration(request: Any, name: str, value: Seconds) -> None:
    getattr(request, name).CopyFrom(_duration(value))


_SETTERS: dict[str, Setter] = {
    "stop": _set_strings,
    "bad_words": _set_strings,
    "stop_token_ids": _set_numbers,
    "token_ids": _set_token_ids,
    "allowed_token_ids": _set_token_ids,
    "logit_bias": _set_mapping,
    "max_memory": _set_mapping,
    "module_map": _set_mapping,
    "chat_template_kwargs": _set_struct,
    "grace": _set_duration,
    "keep_alive": _set_duration,
    "lease_ttl": _set_duration,
    "max_time": _set_duration,
    "ttl": _set_duration,
    "unused_for": _set_duration,
}
"""How to set the fields that are no scalars; the others are assigned."""


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, GenerationParameters.__annotations__, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
