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
_MILD: dict[int, SearchStrategy[Any]] = _SCALARS | {
    _F.CPPTYPE_STRING: st.text("ab c", min_size=1, max_size=4),
    _F.CPPTYPE_DOUBLE: st.sampled_from([0.5, 1.0]),
    _F.CPPTYPE_ENUM: st.integers(0, 2),
    **dict.fromkeys(
        (_F.CPPTYPE_INT32, _F.CPPTYPE_INT64, _F.CPPTYPE_UINT32, _F.CPPTYPE_UINT64),
        st.integers(1, 3),
    ),
}
_LENGTHS = st.one_of(st.integers(0, 3), st.sampled_from([17, 65, 1025, 10_001]))
_ENTRIES = 10_001
_LONG = 10_000
_SMALL = 64


@st.composite
def messages(draw: DrawFn, kind: Descriptor, known: Known) -> Message:
    """A message, every second one mild: made of values that are often valid.

    Args:
        draw: Of hypothesis.
        kind: Its type.
        known: See `Known`; most messages have these fields.
    """
    message: Message = GetMessageClass(kind)()
    _Filling(draw, known, mild=draw(st.booleans())).fill(message)
    return message


class _Filling:
    """Sets fields of one message."""

    def __init__(self, draw: DrawFn, known: Known, *, mild: bool) -> None:
        self._draw = draw
        self._known = known
        self._mild = mild

    def fill(self, message: Message, depth: int = 0) -> None:
        """Sets some of its fields, and of those of the messages that it holds."""
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if not fields or depth > _DEEPEST:
            return
        chosen = self._draw(st.lists(st.sampled_from(fields), max_size=_MOST_FIELDS))
        if self._mild or self._draw(st.integers(0, 9)):
            chosen = [field for field in fields if field.name in self._known] + chosen
        for field in chosen:
            group = field.containing_oneof
            if not (self._mild and group and message.WhichOneof(group.name)):
                self._set(message, field, depth)

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        inner: Any = field.message_type
        held = getattr(message, field.name)
        if inner is None and not field.is_repeated:
            setattr(message, field.name, self._draw(self._scalar(field)))
        elif inner is None:
            entry = self._draw(self._scalar(field))
            is_long = isinstance(entry, str) and len(entry) > _LONG
            held.extend([entry] * min(self._length(), 1 if is_long else _ENTRIES))
        elif inner.GetOptions().map_entry:
            self._set_map(held, inner, depth)
        elif inner.full_name == "google.protobuf.Duration":
            usual = [(1, 0), (60, 0)] if self._mild else _SPANS
            held.seconds, held.nanos = self._draw(
                st.sampled_from(self._known.get(field.name, usual))
            )
        elif field.is_repeated:
            part = held.add()
            self.fill(part, depth + 1)
            if part.ByteSize() < _SMALL:
                held.extend([part] * self._length())
        else:
            held.SetInParent()
            self.fill(held, depth + 1)

    def _set_map(self, held: Any, entry: Descriptor, depth: int) -> None:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for name in self._draw(st.lists(self._scalar(key), max_size=3)):
            if value.message_type is not None:
                held[name].SetInParent()
                self.fill(held[name], depth + 1)
            else:
                held[name] = self._draw(self._scalar(value))
        is_flat = value.message_type is None
        if is_flat and not self._mild and self._draw(st.integers(0, 9)) == 0:
            one = self._draw(self._scalar(value))
            is_text = key.cpp_type == _F.CPPTYPE_STRING
            for number in range(_ENTRIES):
                held[str(number) if is_text else number] = one[:64] if isinstance(one, str) else one

    def _scalar(self, field: FieldDescriptor) -> SearchStrategy[Any]:
        values = self._known.get(field.name)
        usual = (_MILD if self._mild else _SCALARS)[field.cpp_type]
        if not values:
            return usual
        known = st.sampled_from(values)
        return known if self._mild else st.one_of(*[known] * 4, usual)

    def _length(self) -> int:
        return self._draw(st.integers(1, 2) if self._mild else _LENGTHS)
