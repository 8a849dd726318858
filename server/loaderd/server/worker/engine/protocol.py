"""What an engine is, and the typed request that it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loaderd.worker.v1 import worker_pb2

Emit = Callable[[Sequence[worker_pb2.Output]], None]
"""Takes what one engine step brought, at most one output a request; never blocks for long."""


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
        repetition_penalty: 1 for none; applies to greedy choice too.
        no_repeat_ngram_size: 0 for none; applies to greedy choice too.
        seed: From 0 to 2**64 - 1.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    seed: int


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
class GenerationRequest:
    """One valid request.

    Attributes:
        key: The daemon's key, unique in the worker's life.
        request_id: The client's name for it.
        prompt: Token ids, at least one, each in the model's vocabulary.
        sampling: How tokens are chosen.
        stopping: When to end.
        echo: Whether the text begins with the prompt.
        skip_special_tokens: Whether special tokens are left out of the text.
        return_token_ids: Whether the answer has token ids beside the text.
        arrived: Monotonic time of its arrival, in seconds.
    """

    key: int
    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    echo: bool
    skip_special_tokens: bool
    return_token_ids: bool
    arrived: float


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
