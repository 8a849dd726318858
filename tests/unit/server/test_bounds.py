"""Everything that a client sends has a bound, and what exceeds it is refused by name."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from loaderd.server.errors import InvalidArgumentError, InvalidNameError
from loaderd.server.rpc.bounds import BOUNDS, Encoded, check
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2
from loaderd.v1.generation_pb2 import (
    ChatMessage,
    ChatMessages,
    DetokenizeRequest,
    StreamGenerateRequest,
    TokenIds,
)
from loaderd.v1.model_pb2 import (
    AcquireLeaseRequest,
    LoadModelRequest,
    LoadOptions,
    ReleaseLeaseRequest,
    UnloadModelRequest,
)

FILES = (cache_pb2, generation_pb2, model_pb2, system_pb2, health_pb2, reflection_pb2)
LENGTHS = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}
OF_ANY_SHAPE = {"google.protobuf.Struct", "google.protobuf.Duration", "google.protobuf.Any"}


def requests() -> set[Descriptor]:
    """The messages that clients send, and all that those hold."""
    found: set[Descriptor] = set()
    todo = [
        method.input_type
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    while todo:
        message = todo.pop()
        if message not in found:
            found.add(message)
            parts = [field.message_type for field in message.fields if field.message_type]
            todo += [part for part in parts if not is_entry(part) and not has_any_shape(part)]
    return found


def is_entry(message: Descriptor) -> bool:
    return bool(message.GetOptions().map_entry)


def has_any_shape(message: Descriptor) -> bool:
    return message.full_name in OF_ANY_SHAPE


def sized_fields(message: Descriptor) -> Iterator[FieldDescriptor]:
    for field in message.fields:
        inner = field.message_type
        if field.is_repeated or field.type in LENGTHS or (inner and has_any_shape(inner)):
            yield field


def test_every_field_that_has_a_length_has_a_bound() -> None:
    unbounded = [
        field.full_name
        for message in requests()
        for field in sized_fields(message)
        if field.name not in BOUNDS.get(message.full_name, {})
    ]
    assert sorted(unbounded) == []


def test_every_bound_is_that_of_a_field() -> None:
    there = {field.full_name for message in requests() for field in sized_fields(message)}
    bounded = {f"{message}.{field}" for message, fields in BOUNDS.items() for field in fields}
    assert bounded == there


def test_what_lists_and_maps_hold_has_bounds() -> None:
    for message in requests():
        for field in sized_fields(message):
            bound: Any = BOUNDS[message.full_name][field.name]
            parts = {"each": field}
            if field.message_type and is_entry(field.message_type):
                parts = dict(field.message_type.fields_by_name)
            elif not field.is_repeated or isinstance(bound, Encoded):
                continue
            for name, part in parts.items():
                has_length = part.type in LENGTHS
                assert (getattr(bound, name, None) is not None) == has_length, part.full_name


def long(count: int = 257) -> str:
    return "x" * count


VARIABLES = Struct(fields={"x": Value(string_value=long(2**16))})
MODULES = {str(number): "cpu" for number in range(10_001)}


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (
            StreamGenerateRequest(request_id=long(129)),
            "request_id: must have from 1 to 128 characters, not 129",
        ),
        (
            StreamGenerateRequest(request_id=""),
            "request_id: must have from 1 to 128 characters, not 0",
        ),
        (
            StreamGenerateRequest(text=long(2**20 + 1)),
            "text: must have at most 1048576 characters, not 1048577",
        ),
        (
            StreamGenerateRequest(stop=["x"] * 17),
            "stop: must have at most 16 entries, not 17",
        ),
        (
            StreamGenerateRequest(stop=["x", ""]),
            "stop: each must have from 1 to 256 characters, not 0",
        ),
        (
            StreamGenerateRequest(bad_words=[long()]),
            "bad_words: each must have from 1 to 256 characters, not 257",
        ),
        (
            StreamGenerateRequest(logit_bias=dict.fromkeys(range(1025), 1.0)),
            "logit_bias: must have at most 1024 entries, not 1025",
        ),
        (
            StreamGenerateRequest(stop_token_ids=[1] * 65),
            "stop_token_ids: must have at most 64 entries, not 65",
        ),
        (
            StreamGenerateRequest(cache_salt=long()),
            "cache_salt: must have at most 256 characters, not 257",
        ),
        (
            StreamGenerateRequest(allowed_token_ids=TokenIds(ids=[1] * (2**20 + 1))),
            "allowed_token_ids: must have at most 1048576 entries, not 1048577",
        ),
        (
            StreamGenerateRequest(token_ids=TokenIds(ids=[1] * (2**20 + 1))),
            "token_ids: must have at most 1048576 entries, not 1048577",
        ),
        (
            StreamGenerateRequest(messages=ChatMessages(messages=[ChatMessage()] * 1025)),
            "messages: must have at most 1024 entries, not 1025",
        ),
        (
            StreamGenerateRequest(
                messages=ChatMessages(messages=[ChatMessage(), ChatMessage(role=long(65))])
            ),
            "messages[1].role: must have at most 64 characters, not 65",
        ),
        (
            StreamGenerateRequest(
                messages=ChatMessages(messages=[ChatMessage(content=long(2**16))] * 17)
            ),
            "messages: must have at most 1048576 characters in all, not 1114112",
        ),
        (
            StreamGenerateRequest(chat_template_kwargs=VARIABLES),
            "chat_template_kwargs: at most 65536 bytes when encoded",
        ),
        (
            StreamGenerateRequest(max_time=Duration(seconds=86401)),
            "max_time: must be at most 24 hours",
        ),
        (
            StreamGenerateRequest(max_time=Duration(seconds=2**62)),
            "max_time: is no valid time span",
        ),
        (
            DetokenizeRequest(token_ids=[1] * (2**20 + 1)),
            "token_ids: must have at most 1048576 entries, not 1048577",
        ),
        (
            LoadModelRequest(options=LoadOptions(module_map=MODULES)),
            "options.module_map: must have at most 10000 entries, not 10001",
        ),
        (
            LoadModelRequest(options=LoadOptions(module_map={long(): "cpu"})),
            "options.module_map: each key must have at most 256 characters, not 257",
        ),
        (
            LoadModelRequest(options=LoadOptions(module_map={"x": long(65)})),
            "options.module_map: each value must have at most 64 characters, not 65",
        ),
        (
            LoadModelRequest(keep_alive=Duration(seconds=367 * 86400)),
            "keep_alive: must be at most a year; negative is for ever",
        ),
        (
            LoadModelRequest(lease_ttl=Duration(seconds=86401)),
            "lease_ttl: must be at most 24 hours",
        ),
        (AcquireLeaseRequest(ttl=Duration(seconds=2**62)), "ttl: is no valid time span"),
        (UnloadModelRequest(grace=Duration(seconds=86401)), "grace: must be at most 24 hours"),
        (
            ReleaseLeaseRequest(lease_id=long(65)),
            "lease_id: must have at most 64 characters, not 65",
        ),
        (
            cache_pb2.DeleteSnapshotsRequest(models=["org/name"] * 1001),
            "models: must have at most 1000 entries, not 1001",
        ),
        (
            cache_pb2.PruneCacheRequest(unused_for=Duration(seconds=10**11)),
            "unused_for: must be at most 1000 years",
        ),
    ],
)
def test_what_is_too_large_is_refused_by_name(request_: Message, problem: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check(request_)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (LoadModelRequest(model="/" + long(4096)), "model"),
        (cache_pb2.DeleteSnapshotsRequest(models=["org/name", long(4097)]), "models"),
    ],
)
def test_a_name_that_is_too_long_is_no_name(request_: Message, field: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        check(request_)
    assert caught.value.field == field


def test_bounds_belong_to_the_range() -> None:
    check(
        StreamGenerateRequest(
            model="/" + long(4095),
            request_id=long(128),
            messages=ChatMessages(messages=[ChatMessage(role=long(64), content="x")] * 1024),
            stop=[long(256)] * 16,
            stop_token_ids=[1] * 64,
            bad_words=[long(256)] * 128,
            logit_bias=dict.fromkeys(range(1024), 1.0),
            cache_salt=long(256),
            max_time=Duration(seconds=86400),
            keep_alive=Duration(seconds=-1),
        )
    )
    check(StreamGenerateRequest(text=long(2**20)))
    check(StreamGenerateRequest(token_ids=TokenIds(ids=[1] * 2**20)))
