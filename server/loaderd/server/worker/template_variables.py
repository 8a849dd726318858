"""What a request gives to the model's chat template beside the messages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from google.protobuf.struct_pb2 import Struct, Value
from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "chat_template_kwargs"

_MAX_VARIABLES = 16
_MAX_DEPTH = 16
_MAX_TEMPLATES = 8  # a worker has one model, and few models have more than one template
_LONGEST_SHOWN = 40

_LISTS_OF_OBJECTS = ("tools", "documents")
"""Variables of which transformers knows the type."""


def plain(variables: Struct) -> dict[str, Any]:
    """The variables as a template sees them, in Python's own types.

    Raises:
        InvalidArgumentError: They are out of bounds.
    """
    if len(variables.fields) > _MAX_VARIABLES:
        raise InvalidArgumentError(FIELD, f"at most {_MAX_VARIABLES} variables")
    named = _plain_object(variables, depth=1)
    for name in _LISTS_OF_OBJECTS:
        value = named.get(name)
        if value is not None and not _is_list_of_objects(value):
            raise InvalidArgumentError(FIELD, f"{name} must be a list of objects")
    return named


def check_read(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Refuses variables that would change nothing, and those that are not the caller's to set.

    Raises:
        UnsupportedOptionError: The model's chat template does not read one of them.
    """
    template = tokenizer.get_chat_template(tools=variables.get("tools"))
    free = _undeclared(template) - _reserved(tokenizer)
    for name in variables:
        if name not in free:
            takes = f"takes {', '.join(sorted(free))}, and" if free else "takes"
            raise UnsupportedOptionError(
                FIELD, f"the model's chat template {takes} no {name[:_LONGEST_SHOWN]!r}"
            )


@lru_cache(maxsize=_MAX_TEMPLATES)
def _undeclared(template: str) -> frozenset[str]:
    """Names that the template reads and neither sets nor has from transformers' environment."""
    environment = _compile_jinja_template(template).environment  # it has tags that jinja has not
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def _reserved(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names that mean something else: to the daemon, the tokenizer or transformers' functions.

    One of them is `chat_template`, by which a caller would bring a program along.
    """
    functions = (type(tokenizer).apply_chat_template, render_jinja_template)
    parameters = {name for each in functions for name in inspect.signature(each).parameters}
    special = {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}
    return frozenset({"messages"} | special | (parameters - set(_LISTS_OF_OBJECTS)))


def _plain_object(value: Struct, depth: int) -> dict[str, Any]:
    """The object, by name: the wire keeps no order, and equal requests make equal prompts."""
    return {name: _plain(each, depth) for name, each in sorted(value.fields.items())}


def _plain(value: Value, depth: int) -> Any:
    """The value; `depth` is that of the object or list that it is in."""
    kind = value.WhichOneof("kind")
    if kind in {"struct_value", "list_value"} and depth >= _MAX_DEPTH:
        raise InvalidArgumentError(FIELD, f"objects and lists nest at most {_MAX_DEPTH} deep")
    match kind:
        case "null_value":
            return None
        case "bool_value":
            return value.bool_value
        case "string_value":
            return value.string_value
        case "number_value":
            return _plain_number(value.number_value)
        case "struct_value":
            return _plain_object(value.struct_value, depth + 1)
        case "list_value":
            return [_plain(each, depth + 1) for each in value.list_value.values]
    raise InvalidArgumentError(FIELD, "a value is missing; null is a value")


def _plain_number(number: float) -> int | float:
    if not math.isfinite(number):
        raise InvalidArgumentError(FIELD, "numbers must be finite")
    return int(number) if number.is_integer() else number


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)
