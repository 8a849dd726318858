"""The next token of every running completion, chosen for all of them at once."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaderd.server.errors import InvalidArgumentError, LoaderdError
from loaderd.server.worker.engine.batching import choice
from loaderd.server.worker.engine.batching.history import History
from loaderd.server.worker.engine.batching.logits_processors import process
from loaderd.server.worker.engine.batching.transfer import sent
from loaderd.server.worker.engine.protocol import GenerationRequest, SampledToken, Sampling
from loaderd.server.worker.failures import incident

MOST_LOGPROBS = 64
"""Prompt tokens of one request whose logits, each as long as the vocabulary, are made at once."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of one completion.

    Attributes:
        sampling: The request's.
        random: Its own random numbers.
        history: None when no mask or penalty needs one.
        top_logprobs: As in the request.
    """

    sampling: Sampling
    random: random.Random
    history: History | None
    top_logprobs: int | None


class BatchSampler:
    """Chooses tokens for the rows of a batch, each by the options of its own request.

    Every completion has a random generator of its own and takes one number of it for each token
    that it draws. So the same seed gives the same tokens, whichever others are in the batch.

    It keeps the tokens of each completion that masks and penalties depend on: `admit` gives it
    the prompt, and every token that `sample` returns counts as the completion's next.
    """

    def __init__(self) -> None:
        self._rows: dict[Hashable, _Row] = {}

    def admit(self, key: Hashable, request: GenerationRequest) -> None:
        """Takes up a completion.

        Args:
            key: A name for it that no other has.
            request: What it is a completion of; with a seed of its own, if there are several.
        """
        self._rows[key] = _Row(
            sampling=request.sampling,
            random=random.Random(request.sampling.seed),  # noqa: S311 - not for secrets
            history=History(request) if History.needed_for(request) else None,
            top_logprobs=request.top_logprobs,
        )

    def retire(self, key: Hashable) -> None:
        """Forgets a completion; ignored if it is not known."""
        self._rows.pop(key, None)

    def sample(self, logits: Tensor, keys: Sequence[Hashable]) -> list[SampledToken | LoaderdError]:
        """Chooses the next token of each row.

        Args:
            logits: [rows, vocabulary], float32, contiguous: what the model put out for the last
                token of each row. It is overwritten.
            keys: The completion of each row.

        Returns:
            A token for each row; for one that cannot go on, the error for its request.
        """
        rows = [self._rows[key] for key in keys]
        told = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
        changed = [(place, row.history) for place, row in enumerate(rows) if row.history]
        with torch.inference_mode():  # or its tensors could not be overwritten
            logprobs = _rows(logits, told).log_softmax(-1) if told else None
            if changed:
                process(logits, changed)
            token_ids = self._choose(logits, rows).tolist()
        outcomes: list[SampledToken | LoaderdError] = [
            SampledToken(token_id)
            if token_id >= 0
            else no_token(row.sampling, logits[place], masked=row.history is not None)
            for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        ]
        for place, history in changed:
            if token_ids[place] >= 0:
                history.push(token_ids[place])
        if logprobs is not None:
            tops = [rows[place].top_logprobs or 0 for place in told]
            chosen = _tell(logprobs, [max(token_ids[place], 0) for place in told], tops)
            for place, token in zip(told, chosen, strict=True):
                if token_ids[place] >= 0:
                    outcomes[place] = token
        return outcomes

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        drawn = [place for place, row in enumerate(rows) if row.sampling.do_sample]
        if not drawn:
            return choice.best(logits)
        samplings = [rows[place].sampling for place in drawn]
        keys = [rows[place].random.getrandbits(choice.KEY_BITS) for place in drawn]
        if len(drawn) == len(rows):
            return choice.draw(logits, samplings, keys)
        token_ids = choice.best(logits)
        drawn_ids = choice.draw(_rows(logits, drawn), samplings, keys)
        return token_ids.index_copy_(0, _index(drawn, logits.device), drawn_ids)


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[SampledToken]:
    """Log probabilities of tokens that were given.

    Args:
        logits: [tokens, vocabulary], float32: what the model put out before each token.
        token_ids: The tokens.
        top: Alternatives to tell with each.
    """
    return _tell(logits.log_softmax(-1), token_ids, [top] * len(token_ids))


def _tell(logprobs: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[SampledToken]:
    index = _index(token_ids, logprobs.device)[:, None]
    own = logprobs.gather(1, index).squeeze(1).tolist()
    values, best = logprobs.topk(min(max(tops, default=0), logprobs.shape[1]))
    alternatives = zip(best.tolist(), values.tolist(), strict=True)
    return [
        SampledToken(token_id, logprob, tuple(zip(ids[:top], best_logprobs[:top], strict=True)))
        for token_id, logprob, top, (ids, best_logprobs) in zip(
            token_ids, own, tops, alternatives, strict=True
        )
    ]


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows."""
    return logits.index_select(0, _index(rows, logits.device))


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return sent(torch.tensor(numbers), device)


def no_token(sampling: Sampling, logits: Tensor, *, masked: bool) -> LoaderdError:
    """Why no token may come next.

    Args:
        sampling: Of the request.
        logits: What was to choose from, after masks.
        masked: Whether the request has any.
    """
    if not masked or bool(logits.isnan().any()):
        return incident(FloatingPointError("the model's logits are no numbers"), "sampling")
    field = (
        ("allowed_token_ids" if sampling.allowed_token_ids else None)
        or ("bad_words" if sampling.bad_words else None)
        or "no_repeat_ngram_size"
    )
    return InvalidArgumentError(field, "leaves no token that may come next")
