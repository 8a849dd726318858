"""How large each part of a request may be, all in one table.

Whatever has a length of its own (strings, bytes, lists, maps, structures) and every time span that
a client can send is in it; a test walks the descriptors of all methods and fails where one is not.
What a value means is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loaderd.server.errors import InvalidArgumentError, InvalidNameError
from loaderd.server.models.keep_alive import LONGEST_S
from loaderd.server.models.leases import LONGEST_TTL_S
from loaderd.server.store.names import MAX_PATH_LENGTH
from loaderd.v1.generation_pb2 import ChatMessage

MESSAGE_BYTES = 4 * 1024 * 1024
"""Of one request. gRPC itself refuses a larger one, with RESOURCE_EXHAUSTED, before it is read."""


class Bound(Protocol):
    """What one field may hold."""

    def check(self, path: str, value: Any) -> None:
        """Refuses a value.

        Args:
            path: What the error calls the field.
            value: What it holds.

        Raises:
            InvalidArgumentError: The value is out of bounds.
        """


@dataclass(frozen=True)
class Text:
    """A string.

    Attributes:
        most: Characters.
        least: The same.
    """

    most: int
    least: int = 0

    def check(self, path: str, value: str, of: str = "") -> None:
        """See `Bound`; `of` says of what in the field the value is."""
        if not self.least <= len(value) <= self.most:
            span = f"from {self.least} to {self.most}" if self.least else f"at most {self.most}"
            self.refuse(path, f"{of}must have {span} characters, not {len(value)}")

    def refuse(self, path: str, problem: str) -> None:
        """Raises InvalidArgumentError."""
        raise InvalidArgumentError(path, problem)


class Name(Text):
    """A model's name, or a path."""

    def refuse(self, path: str, problem: str) -> None:
        """Raises InvalidNameError."""
        raise InvalidNameError(path, problem)


@dataclass(frozen=True)
class Entries:
    """A list.

    Attributes:
        most: Entries.
        each: One of them, if that has a length.
    """

    most: int
    each: Text | None = None

    def check(self, path: str, value: Sequence[Any]) -> None:
        """See `Bound`."""
        _check_number(path, value, self.most)
        if self.each is not None:
            for entry in value:
                self.each.check(path, entry, "each ")


@dataclass(frozen=True)
class Chat:
    """Messages that make one prompt.

    Attributes:
        most: Messages.
        characters: Of what all of them say.
    """

    most: int
    characters: int

    def check(self, path: str, value: Sequence[ChatMessage]) -> None:
        """See `Bound`."""
        _check_number(path, value, self.most)
        said = sum(len(message.content) for message in value)
        if said > self.characters:
            problem = f"must have at most {self.characters} characters in all, not {said}"
            raise InvalidArgumentError(path, problem)


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

    def check(self, path: str, value: Mapping[Any, Any]) -> None:
        """See `Bound`."""
        _check_number(path, value, self.most)
        for key, held in value.items():
            if self.key is not None:
                self.key.check(path, key, "each key ")
            if self.value is not None:
                self.value.check(path, held, "each value ")


@dataclass(frozen=True)
class Encoded:
    """A message with fields of the client's own choice.

    Attributes:
        most: Bytes on the wire.
    """

    most: int

    def check(self, path: str, value: Message) -> None:
        """See `Bound`."""
        if value.ByteSize() > self.most:
            raise InvalidArgumentError(path, f"at most {self.most} bytes when encoded")


@dataclass(frozen=True)
class Span:
    """A time span.

    Attributes:
        most: Seconds.
        words: The same for people.
    """

    most: float
    words: str

    def check(self, path: str, value: Duration) -> None:
        """See `Bound`."""
        try:
            seconds = value.ToTimedelta().total_seconds()
        except (ValueError, OverflowError):
            raise InvalidArgumentError(path, "is no valid time span") from None
        if seconds > self.most:
            raise InvalidArgumentError(path, f"must be at most {self.words}")


_DAY_S = 24 * 3600.0
_NAME = Name(MAX_PATH_LENGTH)
_SHORT = Text(64)
# A tokenizer takes seconds for a million characters, and hundreds of bytes for each of them; the
# model's other requests wait meanwhile.
_PROMPT = Text(1024 * 1024)
_TOKENS = Entries(1024 * 1024)
_CHAT = Chat(1024, characters=_PROMPT.most)
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
    "loaderd.v1.PruneCacheRequest": {"unused_for": Span(365_250 * _DAY_S, "1000 years")},
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


def check(request: Message) -> None:
    """Refuses a request a part of which is too large, before anything is done with it.

    Raises:
        InvalidArgumentError: A field is out of bounds.
        InvalidNameError: So is a model's name.
    """
    _check_fields(request, "")


def _check_fields(message: Message, path: str) -> None:
    bounds = BOUNDS.get(message.DESCRIPTOR.full_name, {})
    # Such as `token_ids`: what holds nothing but a list is called as the list.
    is_wrapper = bool(path) and len(message.DESCRIPTOR.fields) == 1
    for field, value in message.ListFields():
        inner = path if is_wrapper else f"{path}.{field.name}".lstrip(".")
        bound = bounds.get(field.name)
        if bound is not None:
            bound.check(inner, value)
        if field.type != FieldDescriptor.TYPE_MESSAGE or isinstance(bound, Encoded | Span | Map):
            continue
        if isinstance(value, Message):
            _check_fields(value, inner)
        else:
            for index, part in enumerate(value):
                _check_fields(part, f"{inner}[{index}]")


def _check_number(path: str, value: Sized, most: int) -> None:
    if len(value) > most:
        raise InvalidArgumentError(path, f"must have at most {most} entries, not {len(value)}")
