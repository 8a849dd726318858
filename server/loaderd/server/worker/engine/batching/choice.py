"""Which token comes next: the best one, or one drawn at random, for many rows at once.

`-1` in a result says that a row has no token: its logits are all minus infinity, or no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loaderd.server.worker.engine.protocol import Sampling

_WIDTHS = (512, 8192)
"""How many of the most probable tokens are tried, before all are sorted."""

_BLOCK = 256
"""Columns that `best` looks at together."""


def best(logits: Tensor) -> Tensor:
    """The token of the highest logit in each row; of equal ones the first.

    torch's argmax over a long row is a slow loop on a CPU, its amax a fast one. So: the best
    block of columns first, then the best column in it.

    Args:
        logits: [rows, vocabulary].

    Returns:
        [rows], int64.
    """
    width = logits.shape[1]
    block = min(_BLOCK, width)
    blocks = width // block
    maxima = logits[:, : blocks * block].unflatten(1, (blocks, block)).amax(-1)
    # The last block may overlap the one before it, which then wins.
    maxima = torch.cat([maxima, logits[:, -block:].amax(-1, keepdim=True)], 1)
    highest, which = maxima.max(-1)
    begin = (which * block).clamp_(max=width - block)
    columns = begin[:, None] + torch.arange(block, device=logits.device)
    token_ids = begin + logits.gather(1, columns).argmax(-1)
    return torch.where(highest.isfinite(), token_ids, -1)


def draw(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draws a token in each row: temperature, then top_k, top_p, min_p, typical_p, as transformers.

    A row's token depends on that row, its sampling and its number only: the number is looked up
    in the cumulative probabilities of the row's own tokens, in an order that does not depend on
    the other rows either. What other rows ask for never changes how a row is computed, only
    which rows are computed together.

    Args:
        logits: [rows, vocabulary], float32; it is overwritten.
        samplings: Of each row.
        uniforms: A random number of each row; from 0, below 1.

    Returns:
        [rows], int64.
    """
    vocabulary = logits.shape[1]
    numbers = torch.tensor(uniforms, dtype=torch.float64).to(logits.device)
    limits = _Limits.of(samplings, vocabulary, logits.device)
    logits.div_(limits.temperature)
    token_ids = torch.empty(len(samplings), dtype=torch.int64, device=logits.device)
    limited = [row for row, sampling in enumerate(samplings) if _is_limited(sampling, vocabulary)]
    free = [row for row, sampling in enumerate(samplings) if not _is_limited(sampling, vocabulary)]
    if free:
        token_ids[free] = _inverse_cdf(_rows(logits, free).softmax(-1), _rows(numbers, free))
    for width in (*(width for width in _WIDTHS if width < vocabulary), vocabulary):
        if not limited:
            break
        scores, numbers_left = _rows(logits, limited), _rows(numbers, limited)
        values, candidates = _highest(scores, width)
        kept, complete = _limit(scores, values, limits.rows(limited))
        places = _inverse_cdf(kept.softmax(-1), numbers_left)
        found = candidates.gather(1, places.clamp(min=0)[:, None]).squeeze(1)
        # Of rows that are not complete yet this is nothing; they get theirs in the next round.
        token_ids[limited] = torch.where(places < 0, -1, found)
        done = complete.tolist()
        limited = [row for row, ready in zip(limited, done, strict=True) if not ready]
    return token_ids


def _highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest values of each row, best first, and their columns."""
    if scores.device.type != "cpu":
        values, columns = scores.topk(count)
        return values, columns
    # With its vector instructions numpy takes a third of torch's time, and less for many.
    table = scores.numpy()
    chosen = np.argpartition(table, table.shape[1] - count, axis=-1)[:, -count:]
    order = np.argsort(np.take_along_axis(table, chosen, -1), axis=-1)[:, ::-1]
    best_first = torch.from_numpy(np.take_along_axis(chosen, order, -1))
    return scores.gather(1, best_first), best_first


def _is_limited(sampling: Sampling, vocabulary: int) -> bool:
    return bool(
        0 < sampling.top_k < vocabulary
        or sampling.top_p < 1
        or sampling.min_p > 0
        or sampling.typical_p < 1
    )


class _Limits:
    """The options of some rows as columns, [rows, 1]."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p = table.split(1, 1)

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocabulary: int, device: torch.device) -> _Limits:
        table = [
            (
                sampling.temperature,
                sampling.top_k if sampling.top_k < vocabulary else 0,
                sampling.top_p,
                sampling.min_p,
                sampling.typical_p,
            )
            for sampling in samplings
        ]
        return cls(torch.tensor(table, dtype=torch.float32).to(device))

    def rows(self, rows: Sequence[int]) -> _Limits:
        return _Limits(_rows(self._table, rows))


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _inverse_cdf(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """The column in each row at which the probabilities so far exceed the row's number.

    Args:
        probabilities: [rows, columns], not negative.
        numbers: [rows], float64, from 0, below 1: shares of the row's sum.

    Returns:
        [rows]: a column of a probability above 0; -1 for rows that are no numbers.
    """
    # torch adds up in float64 on a CPU. On an accelerator the sums of float32, made in parallel,
    # might not even grow steadily.
    on_cpu = probabilities.device.type == "cpu"
    sums = probabilities.cumsum(-1, dtype=torch.float32 if on_cpu else torch.float64)
    total = sums[:, -1]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    wanted = torch.minimum((numbers * total).to(total.dtype), below_total)
    columns = torch.searchsorted(sums, wanted[:, None], right=True).squeeze(1)
    return torch.where(total > 0, columns, -1)


def _limit(scores: Tensor, values: Tensor, limits: _Limits) -> tuple[Tensor, Tensor]:
    """Applies top_k, top_p, min_p and typical_p to the most probable tokens of each row.

    Args:
        scores: [rows, vocabulary]: logits over temperature.
        values: [rows, width]: the highest of them, best first.
        limits: Of the rows.

    Returns:
        The values, minus infinity for those that are cut off; and [rows]: whether no token
        beyond these could have stayed, so that the row's outcome is right.
    """
    width, lowest = values.shape[1], values[:, -1:]
    has_k, has_p = limits.top_k > 0, limits.top_p < 1
    place = (limits.top_k.long() - 1).clamp(0, width - 1)
    kth = torch.where(has_k, values.gather(1, place), -math.inf)
    complete = torch.where(has_k, (limits.top_k <= width) & (lowest < kth), False)  # ties stay
    kept = values.masked_fill(values < kth, -math.inf)

    if bool(has_p.any()):
        # The probabilities are among the top_k tokens, if there is such a limit.
        total = torch.where(has_k, kept.logsumexp(-1, True), scores.logsumexp(-1, True))
        probabilities = (kept - total).exp()
        sums = probabilities.cumsum(-1)
        cut = has_p & (sums - probabilities >= limits.top_p)
        cut[:, 0] = False
        kept = kept.masked_fill(cut, -math.inf)
        complete |= ~has_k & has_p & (sums[:, -1:] >= limits.top_p)

    floor = values[:, :1] + limits.min_p.log()  # minus infinity for a min_p of 0
    kept = kept.masked_fill(values < floor, -math.inf)
    complete |= ~has_k & (lowest < floor)

    if bool((limits.typical_p < 1).any()):
        kept = kept.masked_fill(_untypical(kept, limits.typical_p), -math.inf)
    return kept, (complete | (width == scores.shape[1])).squeeze(1)


def _untypical(scores: Tensor, mass: Tensor) -> Tensor:
    """The tokens that locally typical sampling drops, where its `mass` is below 1."""
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum(-1, keepdim=True)
    certainty, order = _highest(-(logprobs + entropy).abs(), scores.shape[1])
    sums = probabilities.gather(1, order).cumsum(-1)
    last = (sums < mass).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    cut = certainty < certainty.gather(1, last)
    return torch.zeros_like(cut).scatter(1, order, cut) & (mass < 1)
