"""The keyword parameters of `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypedDict

Seconds: TypeAlias = timedelta | float
"""A time span: a timedelta, or a number of seconds."""


class GenerationParameters(TypedDict, total=False):
    """Generation parameters, by their names in loaderd.v1. None is the same as not given.

    A parameter that the model's engine does not honour is refused with `UnsupportedOptionError`;
    `ModelDetails.supported_parameters` lists the others.
    """

    request_id: str | None
    """Your name for the request, echoed in the answer and in the daemon's log."""
    chat_template_kwargs: Mapping[str, Any] | None
    """More variables for the chat template (JSON values). Goes with `messages` only.

    For example `{"enable_thinking": False}`; what the model's template does not read is refused.
    """
    add_special_tokens: bool | None
    """Whether the tokenizer adds its special tokens to `text`. Default true."""
    truncate_prompt_tokens: int | None
    """Keep only this many tokens of the prompt, the last ones. Default: refuse a too long one."""
    priority: int | None
    """Whose turn it is in the queue; higher goes first. Default 0."""
    keep_alive: Seconds | None
    """How long the model stays loaded when it is idle afterwards."""
    lease_id: str | None
    """A lease that holds the model."""

    do_sample: bool | None
    """Whether to sample. Default: true when one of the next five asks for it, else the model's."""
    temperature: float | None
    """From 0 to 100; 0 is greedy. Default: the model's own, else 1."""
    top_k: int | None
    """Sample among this many most probable tokens; 0: no limit."""
    top_p: float | None
    """Sample among the most probable tokens whose probabilities reach this sum."""
    min_p: float | None
    """Drop tokens less probable than this share of the best one; 0 to 1."""
    typical_p: float | None
    """Locally typical sampling; above 0, at most 1."""
    seed: int | None
    """Same seed, same request, same tokens. Default: drawn by the daemon; it is in the answer."""
    n: int | None
    """Independent completions of the prompt, or the best of `num_beams`; 1 to 32. Default 1."""
    best_of: int | None
    """Candidates of which the best `n` are returned, at the end. From n to 32; default n."""

    repetition_penalty: float | None
    """Divides (above 1) the logits of tokens that are in the prompt or output."""
    presence_penalty: float | None
    """Subtracted from the logits of tokens in the output; -2 to 2. Default 0."""
    frequency_penalty: float | None
    """Subtracted once per occurrence in the output; -2 to 2. Default 0."""
    no_repeat_ngram_size: int | None
    """No run of this many tokens occurs twice; 0: no limit."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token ids; each -100 to 100."""
    allowed_token_ids: Sequence[int] | None
    """Only these token ids may come; at least one."""
    bad_words: Sequence[str] | str | None
    """Strings that may not come, as the tokens that the tokenizer makes of them."""

    max_new_tokens: int | None
    """Most tokens to generate. Default: 256, or what the context leaves."""
    min_new_tokens: int | None
    """Fewest tokens to generate. Default 0."""
    stop: Sequence[str] | str | None
    """Strings that end the output where they appear."""
    stop_token_ids: Sequence[int] | None
    """Token ids that end the output."""
    include_stop_str_in_output: bool | None
    """Whether the text keeps the stop string that ended it. Default false."""
    ignore_eos: bool | None
    """Whether to go on after the model's end-of-sequence token. Default false."""
    max_time: Seconds | None
    """Most time to generate for, queueing not included. Default: no limit."""

    echo: bool | None
    """Whether the text begins with the prompt. Default false."""
    skip_special_tokens: bool | None
    """Whether special tokens are left out of the text. Default true."""
    return_token_ids: bool | None
    """Whether the answer has token ids beside the text. Default false."""
    logprobs: bool | None
    """Whether the answer has each token's log probability. Default: if `top_logprobs` has."""
    top_logprobs: int | None
    """Log probabilities of this many most probable tokens at each place; at most 20."""
    prompt_logprobs: int | None
    """Log probabilities of the prompt's tokens, with this many alternatives; at most 20."""

    num_beams: int | None
    """Beam search with this many beams, all text at the end; 1 to 32. Default 1: none.

    It does not sample, has no stop strings and tells no log probabilities of its tokens.
    """
    length_penalty: float | None
    """Exponent of the length by which an output's score is divided; -2 to 2. Default 1."""
    early_stopping: bool | None
    """Whether beam search ends as soon as `num_beams` outputs have ended. Default false."""

    bypass_prefix_cache: bool | None
    """Compute the whole prompt, whatever is cached of it. Default false."""
    cache_salt: str | None
    """Prompts share cached prefixes only with prompts of the same salt."""
