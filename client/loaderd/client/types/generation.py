"""Prompts and what models make of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from loaderd.client.types.enums import FinishReason


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    """Who speaks: "system", "user", "assistant", or what else the chat template knows."""
    content: str
    """What is said."""


@dataclass(frozen=True, kw_only=True)
class GenerationStarted:
    """What is known when computation begins."""

    request_id: str
    """The request's id, or the one that the daemon made."""
    model_id: str
    """The id of the model that answers."""
    prompt_tokens: int
    """Tokens of the prompt."""
    seed: int
    """The seed in effect."""


@dataclass(frozen=True, kw_only=True)
class TokenAlternative:
    """One of the most probable tokens at a place."""

    token_id: int
    """The token."""
    text: str
    """Its text when decoded alone."""
    logprob: float
    """Its log probability."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, as the model put it out.

    That is before temperature, penalties, masks and limits.
    """

    token_id: int
    """The token."""
    text: str
    """Its text when decoded alone; U+FFFD stands for what is no whole character."""
    logprob: float
    """Its log probability."""
    top: tuple[TokenAlternative, ...]
    """The most probable tokens at its place, best first, as many as were asked for."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Text that came since the last one."""

    text: str
    """New text; may be empty when token ids or log probabilities were asked for."""
    token_ids: tuple[int, ...]
    """New tokens, if `return_token_ids` was asked for."""
    logprobs: tuple[TokenLogprob, ...]
    """Of the new tokens, if `logprobs` was asked for."""
    index: int
    """Which completion: 0 to n - 1."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a completion ended. One of the last three is set when the reason is STOP."""

    reason: FinishReason
    """Why."""
    eos_token_id: int | None
    """The model's end-of-sequence token that stopped it."""
    stop_token_id: int | None
    """The one of `stop_token_ids` that stopped it."""
    stop_string: str | None
    """The one of `stop` that stopped it."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One whole completion of a prompt."""

    index: int
    """From 0 to n - 1."""
    text: str
    """The text."""
    token_ids: tuple[int, ...]
    """The tokens, if `return_token_ids` was asked for."""
    logprobs: tuple[TokenLogprob, ...]
    """Of each token, if `logprobs` was asked for."""
    finish: Finish
    """How it ended."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    """Tokens of the prompt."""
    cached_prompt_tokens: int
    """Tokens of the prompt whose computation a cache saved."""
    generated_tokens: int
    """Tokens generated, over all completions."""


@dataclass(frozen=True, kw_only=True)
class GenerationTimings:
    """How long a request took in the worker."""

    queue: timedelta
    """Waiting for its turn."""
    prefill: timedelta
    """From its turn to the first token."""
    decode: timedelta
    """From the first token to the last."""
    time_to_first_token: timedelta
    """From the request's arrival to the first token."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished generation.

    `text`, `token_ids`, `logprobs` and `finish` are the first completion's.
    """

    request_id: str
    """The request's id, or the one that the daemon made."""
    model_id: str
    """The id of the model that answered."""
    completions: tuple[Completion, ...]
    """The completions, by index; at least one."""
    prompt_logprobs: tuple[TokenLogprob, ...]
    """Of the prompt's tokens from the second on, if `prompt_logprobs` was asked for."""
    usage: Usage
    """Token counts."""
    timings: GenerationTimings
    """How long it took."""
    seed: int
    """The seed in effect: the same request with it gives the same tokens."""

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's tokens, if `return_token_ids` was asked for."""
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of each of the first completion's tokens, if `logprobs` was asked for."""
        return self.completions[0].logprobs

    @property
    def finish(self) -> Finish:
        """How the first completion ended."""
        return self.completions[0].finish


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A text as tokens."""

    token_ids: tuple[int, ...]
    """The token ids."""
    tokens: tuple[str, ...]
    """The vocabulary's entry of each, as the tokenizer writes it."""


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """What a chat template made of messages."""

    text: str
    """The prompt."""
    token_ids: tuple[int, ...]
    """Its token ids."""
