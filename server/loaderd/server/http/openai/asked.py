"""What a request to the API asks for, as a request of the daemon's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loaderd.server.errors import InvalidArgumentError, LoaderdError, UnsupportedOptionError
from loaderd.server.http.openai.fields import Fields, bounded, checked, token_id
from loaderd.v1.generation_pb2 import StreamGenerateRequest

# Of the API, and named alike here.
_ALIKE = ("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")

EXTENSIONS = (
    "do_sample",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "priority",
    "lease_id",
    "bypass_prefix_cache",
    "cache_salt",
)
"""Fields of `StreamGenerateRequest` that the API does not have, and that are taken as they are."""

_MAX_USER = 512


@dataclass(frozen=True)
class Asked:
    """What is to be generated, and how it is to be told.

    Attributes:
        request: What to generate.
        stream: Whether to tell it as it comes.
        include_usage: Whether a stream ends with token counts.
        user: Who asks, in the client's words; empty if it does not say.
        names: What the client calls the fields of the request that it calls otherwise.
    """

    request: StreamGenerateRequest
    stream: bool
    include_usage: bool
    user: str
    names: Mapping[str, str]

    def in_its_names(self, error: LoaderdError) -> LoaderdError:
        """An error with the field's name that the client knows."""
        if isinstance(error, InvalidArgumentError | UnsupportedOptionError):
            return replace(error, field=self.names.get(error.field, error.field))
        return error


def read_common(fields: Fields, names: Mapping[str, str]) -> Asked:
    """Takes the fields that chat and completions share, but for the prompt.

    Args:
        fields: The request's.
        names: See `Asked.names`.

    Raises:
        InvalidArgumentError: One has a wrong type, or does not go with another.
    """
    request = StreamGenerateRequest(model=fields.need("model", str))
    for name in (*_ALIKE, *EXTENSIONS):
        fields.put(request, name, name)
    _read_bias(fields, request)
    _read_stops(fields, request)
    stream, include_usage = _read_stream(fields)
    user = fields.take("user", str) or ""
    if len(user) > _MAX_USER:
        raise InvalidArgumentError("user", f"must have at most {_MAX_USER} characters")
    return Asked(request, stream, include_usage, user, names)


def _read_bias(fields: Fields, request: StreamGenerateRequest) -> None:
    for key, value in (fields.take("logit_bias", dict) or {}).items():
        if not (key.isascii() and key.isdecimal()):
            raise InvalidArgumentError("logit_bias", "its names must be token ids")
        token = bounded("logit_bias", int(key[:20]), 0, 2**32 - 1)
        request.logit_bias[token] = checked("logit_bias", value, float)


def _read_stops(fields: Fields, request: StreamGenerateRequest) -> None:
    stop = fields.take_any("stop")
    if stop is not None:
        stops = checked("stop", stop, list) if not isinstance(stop, str) else [stop]
        request.stop.extend(checked("stop", each, str) for each in stops)
    ids = fields.take("stop_token_ids", list) or []
    request.stop_token_ids.extend(token_id("stop_token_ids", each) for each in ids)


def _read_stream(fields: Fields) -> tuple[bool, bool]:
    stream = bool(fields.take("stream", bool))
    options = fields.take("stream_options", dict)
    if options is None:
        return stream, False
    if not stream:
        raise InvalidArgumentError("stream_options", "goes with stream only")
    inner = Fields(options, within="stream_options")
    include_usage = bool(inner.take("include_usage", bool))
    inner.refuse_rest()
    return stream, include_usage
