"""What the masks and penalties of a request need to know of its tokens, kept up with each one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loaderd.server.worker.engine.protocol import GenerationRequest

TokenIds: TypeAlias = NDArray[np.int64]

_ROOM = 64
"""Tokens that an array grows by at least."""


class TokenCounts:
    """The different tokens of a text, and how often each of them was generated.

    Args:
        prompt: Tokens that count as there, but not as generated.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt))}
        self._token_ids = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.zeros(len(self._places), np.float32)

    @property
    def token_ids(self) -> TokenIds:
        """Each different token once."""
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `token_ids` was generated."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Counts a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            room = max(_ROOM, place)
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._token_ids[place] = token_id
        self._counts[place] += 1

    def fork(self) -> TokenCounts:
        """The same, to count on apart."""
        other = copy.copy(self)
        other._places = self._places.copy()
        other._token_ids = self._token_ids.copy()
        other._counts = self._counts.copy()
        return other


class ForbiddenRuns:
    """Runs of tokens that may not come, found by what stands before their last token."""

    def __init__(self) -> None:
        self._last_tokens: dict[tuple[int, ...], set[int]] = {}
        self._lengths: set[int] = set()

    def add(self, run: Sequence[int]) -> None:
        """Forbids a run of at least one token."""
        before = tuple(run[:-1])
        self._last_tokens.setdefault(before, set()).add(run[-1])
        self._lengths.add(len(before))

    def after(self, token_ids: Sequence[int]) -> set[int]:
        """The tokens that would complete a run."""
        found = set[int]()
        for length in self._lengths:
            if length <= len(token_ids):
                before = tuple(token_ids[len(token_ids) - length :])
                found |= self._last_tokens.get(before, set())
        return found

    def fork(self) -> ForbiddenRuns:
        """The same, to add to apart."""
        other = ForbiddenRuns()
        other._last_tokens = {before: last.copy() for before, last in self._last_tokens.items()}
        other._lengths = self._lengths.copy()
        return other


class History:
    """The tokens of one completion, as far as its masks and penalties need them.

    Each token costs the same however long the text is.

    Attributes:
        sampling: The request's.
        counts: None when nothing depends on them.
        bias_ids: Tokens whose logits are changed.
        bias: What is added to them.
        allowed_ids: The only tokens that may come; None for all.
    """

    def __init__(self, request: GenerationRequest) -> None:
        sampling, stopping = request.sampling, request.stopping
        self.sampling = sampling
        self.counts = None
        if sampling.repetition_penalty != 1:
            self.counts = TokenCounts(request.prompt)
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = TokenCounts(())
        self.bias_ids = np.array([token_id for token_id, _ in sampling.logit_bias], np.int64)
        self.bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self.allowed_ids: TokenIds | None = None
        if sampling.allowed_token_ids:
            self.allowed_ids = np.array(sampling.allowed_token_ids, np.int64)
        self._eos = stopping.eos_token_ids
        self._without_eos = stopping.min_new_tokens
        self._size = sampling.no_repeat_ngram_size
        self._runs = ForbiddenRuns()
        for word in sampling.bad_words:
            # As transformers does: an end of the text is no word.
            if len(word) > 1 or word[0] not in self._eos:
                self._runs.add(word)
        self._tokens = list(request.prompt)
        if self._size:
            for end in range(self._size, len(self._tokens) + 1):
                self._runs.add(self._tokens[end - self._size : end])

    @classmethod
    def needed_for(cls, request: GenerationRequest) -> bool:
        """Whether anything changes the logits of this request but temperature and limits."""
        sampling, stopping = request.sampling, request.stopping
        return bool(
            sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.no_repeat_ngram_size
            or sampling.logit_bias
            or sampling.allowed_token_ids
            or sampling.bad_words
            or (stopping.min_new_tokens and stopping.eos_token_ids)
        )

    def push(self, token_id: int) -> None:
        """Takes the next token."""
        self._tokens.append(token_id)
        self._without_eos = max(self._without_eos - 1, 0)
        if self.counts is not None:
            self.counts.add(token_id)
        if 0 < self._size <= len(self._tokens):
            self._runs.add(self._tokens[-self._size :])

    def fork(self) -> History:
        """The same, to go on with other tokens."""
        other = copy.copy(self)
        other.counts = self.counts and self.counts.fork()
        other._runs = self._runs.fork()
        other._tokens = self._tokens.copy()
        return other

    def forbidden_ids(self) -> TokenIds:
        """Tokens that may not come next, whatever `allowed_ids` says."""
        found = self._runs.after(self._tokens)
        if self._without_eos:
            found.update(self._eos)
        return np.fromiter(found, np.int64, len(found))
