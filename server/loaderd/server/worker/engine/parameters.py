"""From a client's StreamGenerateRequest to a typed request with every default resolved."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker.engine.protocol import (
    Beams,
    GenerationRequest,
    Sampling,
    Stopping,
)
from loaderd.v1.generation_pb2 import StreamGenerateRequest
from loaderd.worker.v1.worker_pb2 import TraceContext

_IDENTITY = frozenset({"model", "request_id"})
"""Fields that concern no engine."""

_SAMPLES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Fields that only make sense when sampling."""

_DEFAULT_NEW_TOKENS = 256
MAX_COMPLETIONS = 32
"""Token sequences of one request: completions, candidates or beams."""
_MAX_LOGPROBS = 20
_UINT32 = 2**32
_UINT64 = 2**64


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's own generation config says, else what leaves the distribution alone."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What requests are checked against.

    Attributes:
        context_length: Most tokens of prompt and output together; 0 for no fixed limit.
        vocabulary_size: Token ids are below it.
        eos_token_ids: The model's end-of-sequence tokens.
        defaults: Sampling options of the model's own generation config.
    """

    context_length: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults


def check_supported(request: StreamGenerateRequest, engine: str, supported: frozenset[str]) -> None:
    """Refuses what the engine would have to ignore.

    It walks the fields that are set, so a field that is new to the protocol is refused too.

    Raises:
        UnsupportedOptionError: An option asks for something that the engine cannot do.
    """
    for field, _ in request.ListFields():
        if field.name in supported or field.name in _IDENTITY:
            continue
        raise UnsupportedOptionError(field.name, f"the {engine} engine does not support it")
    unknown = UnknownFieldSet(request)
    if len(unknown):
        raise UnsupportedOptionError(
            f"field {unknown[0].field_number}", "this release of the daemon does not know it"
        )


def typed_request(
    request: StreamGenerateRequest,
    *,
    key: int,
    prompt: Sequence[int],
    arrived: float,
    facts: ModelFacts,
    client: str = "",
    bad_words: Sequence[Sequence[int]] = (),
    trace: TraceContext | None = None,
) -> GenerationRequest:
    """Checks what values mean and resolves every default. How long they are the daemon has checked.

    Args:
        request: What the client asked; `check_supported` has passed it.
        key: The daemon's key of the request.
        prompt: Its input as token ids.
        arrived: Monotonic time of its arrival.
        facts: Of the model.
        client: Whose it is; empty if unknown.
        bad_words: Its bad words as token ids, see `Tokenization.bad_words`.
        trace: What it is a part of; None: of no trace.

    Raises:
        InvalidArgumentError: A value is out of bounds or contradicts another.
    """
    given = {field.name: value for field, value in request.ListFields()}
    tokens = _kept_prompt(request, prompt, facts)
    n = given.get("n", 1)
    beams = _beams(request, given)
    return GenerationRequest(
        key=key,
        request_id=request.request_id,
        client=client,
        prompt=tokens,
        sampling=_sampling(request, given, bad_words, facts, beams),
        stopping=_stopping(request, given, len(tokens), facts),
        n=n,
        best_of=_best_of(given, n, beams),
        beams=beams,
        echo=request.echo,
        skip_special_tokens=given.get("skip_special_tokens", True),
        return_token_ids=request.return_token_ids,
        top_logprobs=_top_logprobs(given),
        prompt_logprobs=_alternatives(given, "prompt_logprobs"),
        priority=request.priority,
        cache_salt=request.cache_salt,
        # Tokens of a cached prefix get no logits.
        bypass_prefix_cache=request.bypass_prefix_cache or "prompt_logprobs" in given,
        arrived=arrived,
        trace_id="" if trace is None else trace.trace_id,
        span_id="" if trace is None else trace.span_id,
    )


def _beams(request: StreamGenerateRequest, given: Mapping[str, Any]) -> Beams | None:
    count, penalty = given.get("num_beams", 1), given.get("length_penalty", 1.0)
    _require(1 <= count <= MAX_COMPLETIONS, "num_beams", f"must be from 1 to {MAX_COMPLETIONS}")
    _require(-2 <= penalty <= 2, "length_penalty", "must be from -2 to 2")
    if count == 1:
        only = "goes with num_beams above 1 only"
        _require(penalty == 1, "length_penalty", only)
        _require(not request.early_stopping, "early_stopping", only)
        return None
    _require(not request.stop, "stop", "beams end at tokens only; give stop_token_ids")
    for field in ("logprobs", "top_logprobs"):
        _require(not given.get(field), field, "beam search does not tell them")
    return Beams(count, penalty, request.early_stopping)


def _best_of(given: Mapping[str, Any], n: int, beams: Beams | None) -> int:
    best_of: int = given.get("best_of", n)
    _require(1 <= n <= MAX_COMPLETIONS, "n", f"must be from 1 to {MAX_COMPLETIONS}")
    if beams is not None:
        _require(n <= beams.count, "n", f"at most num_beams, which is {beams.count}")
        _require(best_of == n, "best_of", "beam search already gives the n best of num_beams")
    _require(n <= best_of <= MAX_COMPLETIONS, "best_of", f"must be from n to {MAX_COMPLETIONS}")
    return best_of


def _top_logprobs(given: Mapping[str, Any]) -> int | None:
    top = _alternatives(given, "top_logprobs")
    if "logprobs" not in given:
        return top or None
    _require(given["logprobs"] or not top, "top_logprobs", "contradicts logprobs = false")
    return (top or 0) if given["logprobs"] else None


def _alternatives(given: Mapping[str, Any], field: str) -> int | None:
    wanted: int | None = given.get(field)
    _require((wanted or 0) <= _MAX_LOGPROBS, field, f"at most {_MAX_LOGPROBS}")
    return wanted


def _kept_prompt(
    request: StreamGenerateRequest, prompt: Sequence[int], facts: ModelFacts
) -> tuple[int, ...]:
    field = request.WhichOneof("input") or "text"
    _require(len(prompt) > 0, field, "the prompt has no tokens; give at least one")
    _require_vocabulary(prompt, field, facts)
    if request.HasField("truncate_prompt_tokens"):
        keep = request.truncate_prompt_tokens
        _require(keep >= 1, "truncate_prompt_tokens", "at least 1")
        prompt = prompt[-keep:]
    limit = facts.context_length
    _require(
        not limit or len(prompt) < limit,
        field,
        f"the prompt has {len(prompt)} tokens, the model's context is {limit} and must hold at "
        "least one more; shorten the prompt or set truncate_prompt_tokens",
    )
    return tuple(prompt)


def _sampling(
    request: StreamGenerateRequest,
    given: Mapping[str, Any],
    bad_words: Sequence[Sequence[int]],
    facts: ModelFacts,
    beams: Beams | None,
) -> Sampling:
    defaults = facts.defaults
    sampling = Sampling(
        do_sample=_do_sample(given, defaults, beams),
        temperature=given.get("temperature", defaults.temperature),
        top_k=given.get("top_k", defaults.top_k),
        top_p=given.get("top_p", defaults.top_p),
        min_p=given.get("min_p", defaults.min_p),
        typical_p=given.get("typical_p", defaults.typical_p),
        seed=given.get("seed", secrets.randbelow(_UINT64)),
        repetition_penalty=given.get("repetition_penalty", defaults.repetition_penalty),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        no_repeat_ngram_size=given.get("no_repeat_ngram_size", defaults.no_repeat_ngram_size),
        logit_bias=_logit_bias(request, facts),
        allowed_token_ids=_allowed_token_ids(request, facts),
        bad_words=_bad_words(request, bad_words, facts),
    )
    # Written so that NaN fails.
    # The lower bounds keep logits, which are divided by these, finite.
    _require(
        sampling.temperature == 0 or 0.001 <= sampling.temperature <= 100,
        "temperature",
        "must be 0 or from 0.001 to 100",
    )
    _require(0 < sampling.top_p <= 1, "top_p", "must be above 0, at most 1")
    _require(0 <= sampling.min_p <= 1, "min_p", "must be from 0 to 1")
    _require(0 < sampling.typical_p <= 1, "typical_p", "must be above 0, at most 1")
    penalty = sampling.repetition_penalty
    _require(0.01 <= penalty <= 100, "repetition_penalty", "must be from 0.01 to 100")
    _require(-2 <= sampling.presence_penalty <= 2, "presence_penalty", "must be from -2 to 2")
    _require(-2 <= sampling.frequency_penalty <= 2, "frequency_penalty", "must be from -2 to 2")
    return sampling


def _logit_bias(request: StreamGenerateRequest, facts: ModelFacts) -> tuple[tuple[int, float], ...]:
    bias = request.logit_bias
    _require_vocabulary(list(bias), "logit_bias", facts)
    _require(
        all(-100 <= added <= 100 for added in bias.values()),
        "logit_bias",
        "each must be from -100 to 100",
    )
    return tuple(sorted(bias.items()))


def _allowed_token_ids(request: StreamGenerateRequest, facts: ModelFacts) -> tuple[int, ...]:
    allowed = request.allowed_token_ids.ids
    _require(
        len(allowed) > 0 or not request.HasField("allowed_token_ids"),
        "allowed_token_ids",
        "give at least one token id",
    )
    _require_vocabulary(allowed, "allowed_token_ids", facts)
    return tuple(sorted(set(allowed)))


def _bad_words(
    request: StreamGenerateRequest, token_ids: Sequence[Sequence[int]], facts: ModelFacts
) -> tuple[tuple[int, ...], ...]:
    has_tokens = not request.bad_words or len(token_ids) > 0
    _require(has_tokens, "bad_words", "the model has no tokens for them")
    # A tokenizer may have more tokens than the model; those never come.
    return tuple(tuple(ids) for ids in token_ids if max(ids) < facts.vocabulary_size)


def _do_sample(given: Mapping[str, Any], defaults: SamplingDefaults, beams: Beams | None) -> bool:
    greedy = given.get("temperature", defaults.temperature) == 0
    samples = [
        name for name in _SAMPLES if name in given and not (name == "temperature" and greedy)
    ]
    if beams is not None:
        asked = samples if given.get("temperature") != 0 else []
        asked = asked + (["do_sample"] if given.get("do_sample") else [])
        if asked:
            raise InvalidArgumentError(asked[0], "beam search does not sample")
        return False
    if "do_sample" not in given:
        return not greedy and (bool(samples) or defaults.do_sample)
    if given["do_sample"]:
        _require(not greedy, "temperature", "0 is greedy, which contradicts do_sample = true")
    else:
        _require(not samples, "do_sample", f"false contradicts {', '.join(samples)}")
    return bool(given["do_sample"])


def _stopping(
    request: StreamGenerateRequest,
    given: Mapping[str, Any],
    prompt_tokens: int,
    facts: ModelFacts,
) -> Stopping:
    room = facts.context_length - prompt_tokens if facts.context_length else _UINT32
    max_new = given.get("max_new_tokens", min(_DEFAULT_NEW_TOKENS, room))
    _require(max_new >= 1, "max_new_tokens", "at least 1")
    _require(
        max_new <= room,
        "max_new_tokens",
        f"the prompt has {prompt_tokens} tokens and {max_new} more exceed the model's context of "
        f"{facts.context_length}",
    )
    _require(
        request.min_new_tokens <= max_new,
        "min_new_tokens",
        f"at most max_new_tokens, which is {max_new}",
    )
    stop_ids = request.stop_token_ids
    _require_vocabulary(stop_ids, "stop_token_ids", facts)
    return Stopping(
        max_new_tokens=max_new,
        min_new_tokens=request.min_new_tokens,
        eos_token_ids=() if request.ignore_eos else facts.eos_token_ids,
        stop_token_ids=tuple(stop_ids),
        stop_strings=tuple(request.stop),
        include_stop_string=request.include_stop_str_in_output,
        max_seconds=_max_seconds(request),
    )


def _max_seconds(request: StreamGenerateRequest) -> float | None:
    if not request.HasField("max_time"):
        return None
    seconds = request.max_time.seconds + request.max_time.nanos / 1e9
    _require(seconds > 0, "max_time", "above 0")
    return seconds


def _require_vocabulary(token_ids: Sequence[int], field: str, facts: ModelFacts) -> None:
    highest = max(token_ids, default=0)
    _require(
        highest < facts.vocabulary_size,
        field,
        f"token id {highest} is not below the vocabulary's size of {facts.vocabulary_size}",
    )


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InvalidArgumentError(field, problem)
