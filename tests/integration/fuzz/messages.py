"""Messages of any type, made from its descriptor: valid, nearly valid, and far from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Known: TypeAlias = Mapping[str, Sequence[Any]]
"""By a field's name: values that mean something, such as the id of a model that is loaded."""

_MOST_FIELDS = 4
_DEEPEST = 5
_F = FieldDescriptor

_STRINGS = [
    "",
    " ",
    "\0",
    "..",
    "/",
    "/proc/self",
    "~",
    "org/name@",
    "{0}{model}%s",
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{SNOWMAN}\N{COMBINING ACUTE ACCENT}",
    "\U000e0001" * 200,
    "\N{GRINNING FACE}" * 300,
    "x" * 65,
    "a b" * 2000,
    "x" * (2**20 + 1),
    "\N{LATIN SMALL LETTER E WITH ACUTE}" * 2**21,
]
_SPANS = [
    *(
        (seconds, 0)
        for seconds in (0, 1, 60, 86_400, 86_401, -1, 2**63 - 1, -(2**63), 315576 * 10**6)
    ),
    *((0, 1), (1, -1), (0, 2**31 - 1), (-1, -(2**31))),
]
_FLOATS = [0.0, -0.0, 0.001, 0.5, 1.0, 2.0, -2.0, 5e-324, 1e308]


def _integers(bits: int, *, signed: bool) -> SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    edges = [0, 1, 2, 3, 8, 20, 32, 33, high, high - 1, high // 2, low]
    return st.one_of(st.sampled_from(edges), st.integers(low, high))


_SCALARS: dict[int, SearchStrategy[Any]] = {
    _F.CPPTYPE_STRING: st.one_of(st.text(max_size=12), st.sampled_from(_STRINGS)),
    _F.CPPTYPE_INT32: _integers(32, signed=True),
    _F.CPPTYPE_INT64: _integers(64, signed=True),
    _F.CPPTYPE_UINT32: _integers(32, signed=False),
    _F.CPPTYPE_UINT64: _integers(64, signed=False),
    _F.CPPTYPE_DOUBLE: st.one_of(st.sampled_from(_FLOATS), st.floats()),
    _F.CPPTYPE_FLOAT: st.one_of(st.sampled_from(_FLOATS[:-2]), st.floats(width=32)),
    _F.CPPTYPE_BOOL: st.booleans(),
    _F.CPPTYPE_ENUM: st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
}
_LENGTHS = st.one_of(st.integers(0, 3), st.sampled_from([17, 65, 1025, 10_001]))


@st.composite
def messages(draw: DrawFn, kind: Descriptor, known: Known) -> Message:
    """A message, most often with those of its fields that `known` has values for.

    Args:
        draw: Of hypothesis.
        kind: Its type.
        known: See `Known`.
    """
    message: Message = GetMessageClass(kind)()
    _fill(draw, message, known, 0)
    return message


def _fill(draw: DrawFn, message: Message, known: Known, depth: int) -> None:
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    chosen = draw(st.lists(st.sampled_from(fields), max_size=_MOST_FIELDS))
    if draw(st.integers(0, 9)):
        chosen = [field for field in fields if field.name in known] + chosen
    for field in chosen:
        _set(draw, message, field, known, depth)


def _set(draw: DrawFn, message: Message, field: FieldDescriptor, known: Known, depth: int) -> None:
    inner = field.message_type
    if inner is None and not field.is_repeated:
        setattr(message, field.name, draw(_scalar(field, known)))
    elif inner is None:
        entry, length = draw(_scalar(field, known)), draw(_LENGTHS)
        if isinstance(entry, str) and len(entry) > 10_000:
            length = min(length, 1)
        getattr(message, field.name).extend([entry] * length)
    elif inner.GetOptions().map_entry:
        _set_map(draw, message, field, known, depth)
    elif inner.full_name == "google.protobuf.Duration":
        seconds, nanos = draw(st.sampled_from(known.get(field.name, _SPANS)))
        getattr(message, field.name).MergeFrom(GetMessageClass(inner)(seconds=seconds, nanos=nanos))
    elif field.is_repeated:
        part = getattr(message, field.name).add()
        if depth < _DEEPEST:
            _fill(draw, part, known, depth + 1)
        if part.ByteSize() < 64:
            getattr(message, field.name).extend([part] * draw(_LENGTHS))
    else:
        getattr(message, field.name).SetInParent()
        if depth < _DEEPEST:
            _fill(draw, getattr(message, field.name), known, depth + 1)


def _set_map(
    draw: DrawFn, message: Message, field: FieldDescriptor, known: Known, depth: int
) -> None:
    entry = field.message_type
    if entry is None:
        raise TypeError(f"{field.full_name} is no map")
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    held = getattr(message, field.name)
    for name in draw(st.lists(_scalar(key, {}), max_size=3)):
        if value.message_type is not None:
            held[name].SetInParent()
            _fill(draw, held[name], known, depth + 1) if depth < _DEEPEST else None
        else:
            held[name] = draw(_scalar(value, {}))
    if draw(st.integers(0, 19)) == 0 and value.message_type is None:
        many = range(10_001) if key.cpp_type != _F.CPPTYPE_STRING else map(str, range(10_001))
        one = draw(_scalar(value, {}))
        for name in many:
            held[name] = one[:64] if isinstance(one, str) else one


def _scalar(field: FieldDescriptor, known: Known) -> SearchStrategy[Any]:
    values = known.get(field.name)
    strategy = _SCALARS[field.cpp_type]
    return strategy if not values else st.one_of(*[st.sampled_from(values)] * 4, strategy)
