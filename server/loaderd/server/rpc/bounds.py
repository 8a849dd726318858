"""How large each part of a request may be, all in one table.

Whatever has a length of its own (strings, bytes, lists, maps, structures) and every time span that
a client can send is in it; a test walks the descriptors of all methods and fails where one is not.
What a value means is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loaderd.server.errors import InvalidArgumentError, InvalidNameError
from loaderd.server.models.keep_alive import LONGEST_S
from loaderd.server.models.leases import LONGEST_TTL_S
from loaderd.server.store.names import MAX_PATH_LENGTH

MESSAGE_BYTES = 4 * 1024 * 1024
"""Of one request. gRPC itself refuses a larger one, with RESOURCE_EXHAUSTED, before it is read."""


class Bound(Protocol):
    """What one field may hold."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with the field's value; None if nothing is."""


@dataclass(frozen=True)
class Text:
    """A string.

    Attributes:
        most: Characters.
        least: The same.
    """

    most: int
    least: int = 0

    def problem(self, value: str) -> str | None:
        """See `Bound`."""
        if self.least <= len(value) <= self.most:
            return None
        return f"must have {_span(self.least, self.most)} characters, not {len(value)}"


class Name(Text):
    """A model's name, or a path."""


@dataclass(frozen=True)
class Entries:
    """A list.

    Attributes:
        most: Entries.
        each: One of them, if that has a length.
    """

    most: int
    each: Text | None = None

    def problem(self, value: Sequence[Any]) -> str | None:
        """See `Bound`."""
        if len(value) > self.most:
            return _too_many(value, self.most)
        return None if self.each is None else _first_problem("each", self.each, value)


@dataclass(frozen=True)
class Map:
    """A map.

    Attributes:
        most: Entries.
        key: A key, if that has a length.
        value: A value, if that has one.
    """

    most: int
    key: Text | None = None
    value: Text | None = None

    def problem(self, value: Mapping[Any, Any]) -> str | None:
        """See `Bound`."""
        if len(value) > self.most:
            return _too_many(value, self.most)
        if self.key is not None and (problem := _first_problem("each key", self.key, list(value))):
            return problem
        if self.value is not None:
            return _first_problem("each value", self.value, list(value.values()))
        return None


@dataclass(frozen=True)
class Encoded:
    """A message with fields of the client's own choice.

    Attributes:
        most: Bytes on the wire.
    """

    most: int

    def problem(self, value: Message) -> str | None:
        """See `Bound`."""
        return None if value.ByteSize() <= self.most else f"at most {self.most} bytes when encoded"


@dataclass(frozen=True)
class Span:
    """A time span.

    Attributes:
        most: Seconds.
        words: The same for people.
    """

    most: float
    words: str

    def problem(self, value: Duration) -> str | None:
        """See `Bound`."""
        try:
            seconds = value.ToTimedelta().total_seconds()
        except (ValueError, OverflowError):
            return "is no valid time span"
        return None if seconds <= self.most else f"must be at most {self.words}"


_DAY_S = 24 * 3600.0
_NAME = Name(MAX_PATH_LENGTH)
_SHORT = Text(64)
_PROMPT = Text(2 * 1024 * 1024)
_TOKENS = Entries(1024 * 1024)
_CHAT = Entries(1024)
_TEMPLATE_VARIABLES = Encoded(64 * 1024)
_KEEP_ALIVE = Span(LONGEST_S, "a year; negative is for ever")
_LEASE = Span(LONGEST_TTL_S, "24 hours")

_GENERATION: dict[str, Bound] = {
    "model": _NAME,
    "request_id": Text(128, least=1),
    "text": _PROMPT,
    "chat_template_kwargs": _TEMPLATE_VARIABLES,
    "keep_alive": _KEEP_ALIVE,
    "lease_id": _SHORT,
    "logit_bias": Map(1024),
    "bad_words": Entries(128, Text(256, least=1)),
    "stop": Entries(16, Text(256, least=1)),
    "stop_token_ids": Entries(64),
    "max_time": Span(_DAY_S, "24 hours"),
    "cache_salt": Text(256),
}

BOUNDS: dict[str, dict[str, Bound]] = {
    "loaderd.v1.StreamGenerateRequest": _GENERATION,
    "loaderd.v1.GenerateRequest": _GENERATION,
    "loaderd.v1.TokenIds": {"ids": _TOKENS},
    "loaderd.v1.ChatMessages": {"messages": _CHAT},
    "loaderd.v1.ChatMessage": {"role": _SHORT, "content": _PROMPT},
    "loaderd.v1.TokenizeRequest": {
        "model": _NAME,
        "text": _PROMPT,
        "chat_template_kwargs": _TEMPLATE_VARIABLES,
    },
    "loaderd.v1.DetokenizeRequest": {"model": _NAME, "token_ids": _TOKENS},
    "loaderd.v1.ApplyChatTemplateRequest": {
        "model": _NAME,
        "messages": _CHAT,
        "chat_template_kwargs": _TEMPLATE_VARIABLES,
    },
    "loaderd.v1.LoadModelRequest": {
        "model": _NAME,
        "keep_alive": _KEEP_ALIVE,
        "lease_ttl": _LEASE,
    },
    "loaderd.v1.LoadOptions": {
        "device_map": _SHORT,
        # No model has so many layers, and the key of a loaded model should not be larger.
        "module_map": Map(10_000, key=Text(256), value=_SHORT),
        "max_memory": Map(1024, key=_SHORT),
    },
    "loaderd.v1.UnloadModelRequest": {"model": _NAME, "grace": Span(_DAY_S, "24 hours")},
    "loaderd.v1.GetModelRequest": {"model": _NAME},
    "loaderd.v1.PlanModelRequest": {"model": _NAME},
    "loaderd.v1.AcquireLeaseRequest": {"model": _NAME, "ttl": _LEASE},
    "loaderd.v1.RenewLeaseRequest": {"lease_id": _SHORT},
    "loaderd.v1.ReleaseLeaseRequest": {"lease_id": _SHORT},
    "loaderd.v1.ResolveModelRequest": {"model": _NAME},
    "loaderd.v1.DownloadModelRequest": {"model": _NAME},
    "loaderd.v1.CancelDownloadRequest": {"model": _NAME},
    "loaderd.v1.VerifySnapshotRequest": {"model": _NAME},
    "loaderd.v1.DeleteSnapshotsRequest": {"models": Entries(1000, _NAME)},
    "loaderd.v1.PruneCacheRequest": {"unused_for": Span(36525 * _DAY_S, "100 years")},
    "grpc.health.v1.HealthCheckRequest": {"service": _NAME},
    "grpc.reflection.v1alpha.ServerReflectionRequest": {
        "host": Text(256),
        "file_by_filename": Text(4096),
        "file_containing_symbol": Text(4096),
        "all_extension_numbers_of_type": Text(4096),
        "list_services": Text(4096),
    },
    "grpc.reflection.v1alpha.ExtensionRequest": {"containing_type": Text(4096)},
}
"""The bounds of each message's fields. A message that others hold has its own entry."""

_Problem: TypeAlias = tuple[str, str, Bound]


def check(request: Message) -> None:
    """Refuses a request a part of which is too large, before anything is done with it.

    Raises:
        InvalidArgumentError: A field is out of bounds.
        InvalidNameError: So is a model's name.
    """
    if found := _first(request, ""):
        path, problem, bound = found
        entry = bound.each if isinstance(bound, Entries) else bound
        error = InvalidNameError if isinstance(entry, Name) else InvalidArgumentError
        raise error(path, problem)


def _first(message: Message, path: str) -> _Problem | None:
    """The first problem of a message, and the path of the field that has it."""
    bounds = BOUNDS.get(message.DESCRIPTOR.full_name, {})
    is_wrapper = path and len(message.DESCRIPTOR.fields) == 1
    for field, value in message.ListFields():
        # Such as `token_ids`: what holds nothing but a list is called as the list.
        inner = path if is_wrapper else f"{path}.{field.name}".lstrip(".")
        bound = bounds.get(field.name)
        if bound is not None and (problem := bound.problem(value)):
            return inner, problem, bound
        if isinstance(bound, Encoded | Span | Map) or field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        parts = ((None, value),) if isinstance(value, Message) else enumerate(value)
        for index, part in parts:
            if found := _first(part, inner if index is None else f"{inner}[{index}]"):
                return found
    return None


def _first_problem(what: str, bound: Text, values: Sequence[str]) -> str | None:
    problem = next(filter(None, map(bound.problem, values)), None)
    return None if problem is None else f"{what} {problem}"


def _too_many(value: Sized, most: int) -> str:
    return f"must have at most {most} entries, not {len(value)}"


def _span(least: int, most: int) -> str:
    return f"from {least} to {most}" if least else f"at most {most}"
