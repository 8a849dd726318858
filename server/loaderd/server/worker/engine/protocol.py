"""What an engine is, and the typed request that it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loaderd.worker.v1 import worker_pb2

Emit = Callable[[Sequence[worker_pb2.Output]], None]
"""Takes what one engine step brought, for all requests; never blocks for long."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; every default is resolved.

    Attributes:
        do_sample: Draw a token; else take the most probable one.
        temperature: Above 0 when sampling.
        top_k: 0 for no limit.
        top_p: 1 for no limit.
        min_p: 0 for no limit.
        typical_p: 1 for no limit.
        seed: From 0 to 2**64 - 1.
        repetition_penalty: 1 for none. This and what follows applies to greedy choice too.
        presence_penalty: 0 for none.
        frequency_penalty: 0 for none.
        no_repeat_ngram_size: 0 for none.
        logit_bias: Token ids and what is added to their logits; each id once.
        allowed_token_ids: Only these may come; empty for no limit.
        bad_words: Runs of token ids that may not come; none empty.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Stopping:
    """When the output ends.

    Attributes:
        max_new_tokens: At least 1; prompt and output fit the model's context.
        min_new_tokens: No stop ends the output before this many tokens.
        eos_token_ids: The model's end-of-sequence tokens; empty when they are to be ignored.
        stop_token_ids: The request's own.
        stop_strings: None of them empty.
        include_stop_string: Whether the text keeps the stop string.
        max_seconds: From the request's turn on; None for no limit.
    """

    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    max_seconds: float | None


@dataclass(frozen=True, slots=True)
class Beams:
    """How to search with beams.

    Attributes:
        count: Of the beams; at least 2.
        length_penalty: Exponent of the length by which a score is divided.
        early_stopping: Whether to end as soon as `count` outputs have ended.
    """

    count: int
    length_penalty: float
    early_stopping: bool


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One valid request.

    Attributes:
        key: The daemon's key, unique in the worker's life.
        request_id: The client's name for it.
        client: Whose it is, for fairness in the queue; empty if unknown.
        prompt: Token ids, at least one, each in the model's vocabulary.
        sampling: How tokens are chosen.
        stopping: When to end.
        n: Completions that the client gets.
        best_of: Completions that are made, of which the `n` best are given; at least `n`, and no
            more with beams.
        beams: How to search; None for one token after the other.
        echo: Whether the text begins with the prompt.
        skip_special_tokens: Whether special tokens are left out of the text.
        return_token_ids: Whether the answer has token ids beside the text.
        top_logprobs: Alternatives told with each token's log probability; None when the client
            wants no log probabilities, not even the token's own.
        prompt_logprobs: The same for the prompt's tokens.
        priority: Higher goes first.
        cache_salt: Prompts share cached prefixes only with prompts of the same salt.
        bypass_prefix_cache: Whether the whole prompt is computed, whatever is cached of it.
        arrived: Monotonic time of its arrival, in seconds.
        trace_id: Of the trace that it is a part of, for the log; empty: of none.
        span_id: Of its span in that trace; the same.
    """

    key: int
    request_id: str
    client: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    n: int
    best_of: int
    beams: Beams | None
    echo: bool
    skip_special_tokens: bool
    return_token_ids: bool
    top_logprobs: int | None
    prompt_logprobs: int | None
    priority: int
    cache_salt: str
    bypass_prefix_cache: bool
    arrived: float
    trace_id: str = ""
    span_id: str = ""

    @property
    def log_fields(self) -> dict[str, str]:
        """Whose lines of the log are that tell of it."""
        return {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
        }

    @property
    def sequences(self) -> int:
        """Token sequences that are computed for it, side by side where the engine can."""
        return self.beams.count if self.beams else self.best_of


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token that a completion goes on with, or one of a prompt.

    Attributes:
        token_id: The token.
        logprob: Its log probability in what the model put out, before temperature, penalties,
            masks and limits; None when it was not asked for.
        top: The most probable tokens at its place and their log probabilities, best first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """Generates for one loaded model, in threads of its own.

    Each submitted request gets exactly one last output, `finished` or `error`, whatever happens
    to it: served, cancelled while queued or running, failed, or left when the engine closes.
    """

    name: str
    """As ModelDetails.engine tells it."""

    supported_parameters: frozenset[str]
    """Fields of StreamGenerateRequest that it honours."""

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request."""

    def cancel(self, key: int) -> None:
        """Ends a request soon, with FINISH_REASON_CANCELLED; ignored if it has ended."""

    def close(self) -> None:
        """Cancels all requests and ends the engine's threads."""
