"""The fields of a request: each is taken by its name, and what is left over is refused."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError, Message

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError

T = TypeVar("T")

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_TYPES: dict[int, type] = {
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_DOUBLE: float,
    FieldDescriptor.CPPTYPE_STRING: str,
}
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MOST_DIGITS = 300  # a float has no more


class Fields:
    """A JSON object whose fields are taken one by one. A null is a field that is not given.

    Args:
        values: The object.
        within: Where it is, if it is a part of another one.
    """

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._values = dict(values)
        self._prefix = f"{within}." if within else ""

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """The object that a request's body is.

        Raises:
            InvalidArgumentError: It is none.
        """
        try:
            values = json.loads(body.decode(), parse_constant=_no_number, parse_int=_integer)
        except (ValueError, RecursionError):
            raise InvalidArgumentError("body", "is not JSON") from None
        if not isinstance(values, dict):
            raise InvalidArgumentError("body", "must be an object")
        if b"\\u" in body and _has_half_characters(values):
            raise InvalidArgumentError("body", "has halves of surrogate pairs")
        return cls(values)

    def take(self, name: str, kind: type[T]) -> T | None:
        """A field's value; None if it is not given.

        Raises:
            InvalidArgumentError: It is not of its kind.
        """
        value = self._values.pop(name, None)
        return None if value is None else checked(self._prefix + name, value, kind)

    def need(self, name: str, kind: type[T]) -> T:
        """The value of a field that must be given.

        Raises:
            InvalidArgumentError: It is not given, or not of its kind.
        """
        value = self.take(name, kind)
        if value is None:
            raise InvalidArgumentError(self._prefix + name, "is required")
        return value

    def take_any(self, name: str) -> Any:
        """The value of a field of several kinds; None if it is not given."""
        return self._values.pop(name, None)

    def put(self, message: Message, field: str, name: str) -> None:
        """Takes a field and sets one of a message, whose type it must have.

        Args:
            message: The message.
            field: The message's field.
            name: The name here.

        Raises:
            InvalidArgumentError: It has another type.
        """
        value = self._values.pop(name, None)
        if value is None:
            return
        kind = message.DESCRIPTOR.fields_by_name[field].cpp_type
        if kind in _BOUNDS:
            setattr(message, field, bounded(name, value, *_BOUNDS[kind]))
        elif kind == FieldDescriptor.CPPTYPE_MESSAGE:
            try:
                ParseDict(checked(name, value, dict), getattr(message, field))
                # As deep in a message as it will travel; what nobody could read is refused here.
                type(message).FromString(message.SerializeToString())
            except (ParseError, DecodeError, RecursionError):
                raise InvalidArgumentError(name, "is nested too deep") from None
        else:
            setattr(message, field, checked(name, value, _TYPES[kind]))

    def refuse_rest(self) -> None:
        """Refuses what was not taken.

        Raises:
            UnsupportedOptionError: Something is left.
        """
        for name in self._values:
            problem = "is not a field that this API honours"
            raise UnsupportedOptionError(self._prefix + name, problem)


def checked(name: str, value: Any, kind: type[T]) -> T:
    """A value that must be of a kind; an integer is also a number.

    Raises:
        InvalidArgumentError: It is not.
    """
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise InvalidArgumentError(name, f"must be {_KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise InvalidArgumentError(name, "is too large")
    return value  # type: ignore[no-any-return]  # checked above


def bounded(name: str, value: Any, least: int, most: int) -> int:
    """An integer within bounds.

    Raises:
        InvalidArgumentError: It is not.
    """
    number = checked(name, value, int)
    if not least <= number <= most:
        raise InvalidArgumentError(name, f"must be from {least} to {most}")
    return number


def token_id(name: str, value: Any) -> int:
    """A token's id, which the model checks against its vocabulary.

    Raises:
        InvalidArgumentError: It can be none.
    """
    return bounded(name, value, *_BOUNDS[FieldDescriptor.CPPTYPE_UINT32])


def _has_half_characters(values: dict[str, Any]) -> bool:
    r"""Whether a text has what UTF-8 does not, such as "\ud800"."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_number(text: str) -> float:
    raise ValueError(text)


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("too long")
    return int(digits)
