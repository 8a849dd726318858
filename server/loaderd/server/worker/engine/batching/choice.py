"""Which token comes next: the best one, or one drawn at random, for many rows at once.

`-1` in a result says that a row has no token: its logits are all minus infinity, or no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loaderd.server.worker.engine.batching.transfer import sent
from loaderd.server.worker.engine.protocol import Sampling

KEY_BITS = 63
"""Bits of the random numbers that `draw` takes."""

_WIDTHS = (128, 1024, 8192)
"""How many of the most probable tokens are tried, before all are sorted."""

_GOLDEN, _FIRST, _SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""The constants of splitmix64, as signed numbers."""

_GROUP = 32
"""Columns that `highest` looks at together, where it looks for few."""

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


def draw(logits: Tensor, samplings: Sequence[Sampling], keys: Sequence[int]) -> Tensor:
    """Draws a token in each row: temperature, then top_k, top_p, min_p, typical_p, as transformers.

    A row's token depends on that row, its sampling and its key only. Each token gets noise that
    is a function of the row's key and of the token's id, and the highest sum of logit and noise
    wins (the Gumbel-max trick), which is as good as drawing from the probabilities. So what else
    is in the batch does not matter, and little even if it changes the rounding of the logits: a
    token changes about as seldom as the probabilities themselves do. One random number looked up
    in cumulative probabilities is ten times as likely to hit another token then, because there
    every change shifts all that follow.

    Args:
        logits: [rows, vocabulary], float32; it is overwritten.
        samplings: Of each row.
        keys: A random number of each row; of `KEY_BITS` bits.

    Returns:
        [rows], int64.
    """
    vocabulary = logits.shape[1]
    limits = _Limits.of(samplings, vocabulary, logits.device)
    logits.div_(limits.temperature)
    row_keys = sent(torch.tensor(keys, dtype=torch.int64), logits.device)[:, None]
    token_ids = torch.empty(len(samplings), dtype=torch.int64, device=logits.device)
    left = list(range(len(samplings)))
    for width in (*(width for width in _WIDTHS if width < vocabulary), vocabulary):
        rows = sent(torch.tensor(left), logits.device)
        scores, those, own = _rows(logits, rows), limits.rows(left, rows), _rows(row_keys, rows)
        values, candidates = highest(scores, width)
        total = scores.logsumexp(-1, keepdim=True)
        kept, holds = _limit(values, total, those)
        best_score, winner = (kept + _noise(own, candidates)).max(-1, keepdim=True)
        exists = best_score.isfinite()
        token_ids[rows] = torch.where(exists, candidates.gather(1, winner), -1).squeeze(1)
        if width == vocabulary:
            break
        # In a row without limits, all other tokens run together as one; if they win, the race
        # goes on among them.
        share = (values.logsumexp(-1, keepdim=True) - total).exp().clamp(max=1)
        others = torch.full_like(winner, vocabulary + width)
        wins = best_score >= total + torch.log1p(-share) + _noise(own, others)
        wins |= values[:, -1:] == -math.inf  # there are no others
        done = (torch.where(those.any, holds, wins) | ~exists).squeeze(1).tolist()
        if all(done):
            break
        logits[rows[:, None], candidates] = torch.where(those.any, values, -math.inf)
        left = [row for row, ready in zip(left, done, strict=True) if not ready]
    return token_ids


def _noise(keys: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, a function of key and column: by the hash of splitmix64."""
    bits = keys + (columns + 1) * _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    bits = bits ^ _shifted(bits, 31)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shifted to the right as if there were no sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest values of each row, best first, and their columns.

    Args:
        scores: [rows, columns].
        count: At most the columns.

    Returns:
        Both [rows, count].
    """
    if scores.device.type != "cpu":
        values, columns = scores.topk(count)
        return values, columns
    width = scores.shape[1]
    if count * _GROUP * 2 >= width:
        chosen = _partition(scores, count)
        values, order = scores.gather(1, chosen).sort(-1, descending=True)
        return values, chosen.gather(1, order)
    # Maxima of groups of columns are soon there, and the highest values are in the groups of the
    # highest maxima. What is left of the columns is one more group that always counts.
    groups = width // _GROUP
    maxima = scores[:, : groups * _GROUP].unflatten(1, (groups, _GROUP)).amax(-1)
    within = (_partition(maxima, count)[..., None] * _GROUP + torch.arange(_GROUP)).flatten(1)
    rest = torch.arange(groups * _GROUP, width).expand(len(within), -1)
    columns = torch.cat([within, rest], 1)
    values, places = highest(scores.gather(1, columns), count)
    return values, columns.gather(1, places)


def _partition(scores: Tensor, count: int) -> Tensor:
    """Places of the highest values of each row, in any order; on a CPU."""
    # With its vector instructions numpy takes a third of torch's time, and less for many.
    table = scores.numpy()
    chosen = np.argpartition(table, table.shape[1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(chosen)


class _Limits:
    """The options of some rows as columns, [rows, 1].

    Args:
        samplings: Of the rows.
        table: [rows, 5], of the same.
    """

    def __init__(self, samplings: Sequence[Sampling], table: Tensor) -> None:
        self._samplings = samplings
        self._table = table
        self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p = table.split(1, 1)
        self.any = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0) | (self.typical_p < 1)
        # Known without asking the device.
        self.some_top_p = any(sampling.top_p < 1 for sampling in samplings)
        self.some_typical_p = any(sampling.typical_p < 1 for sampling in samplings)

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
        return cls(samplings, sent(torch.tensor(table, dtype=torch.float32), device))

    def rows(self, rows: Sequence[int], index: Tensor) -> _Limits:
        """Of fewer rows, which `index` says on the device."""
        return _Limits([self._samplings[row] for row in rows], _rows(self._table, index))


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _limit(values: Tensor, total: Tensor, limits: _Limits) -> tuple[Tensor, Tensor]:
    """Applies top_k, top_p, min_p and typical_p to the most probable tokens of each row.

    Args:
        values: [rows, width]: the highest logits over temperature, best first.
        total: [rows, 1]: logarithm of the sum of the exponentials of all of them.
        limits: Of the rows.

    Returns:
        The values, minus infinity for those that are cut off; and [rows, 1]: whether no token
        beyond these could have stayed. Never so for rows without limits.
    """
    width, lowest = values.shape[1], values[:, -1:]
    has_k, has_p = limits.top_k > 0, limits.top_p < 1
    place = (limits.top_k.long() - 1).clamp(0, width - 1)
    kth = torch.where(has_k, values.gather(1, place), -math.inf)
    complete = torch.where(has_k, (limits.top_k <= width) & (lowest < kth), False)  # ties stay
    kept = values.masked_fill(values < kth, -math.inf)

    if limits.some_top_p:
        # The probabilities are among the top_k tokens, if there is such a limit.
        among = torch.where(has_k, kept.logsumexp(-1, keepdim=True), total)
        probabilities = (kept - among).exp()
        sums = probabilities.cumsum(-1)
        cut = has_p & (sums - probabilities >= limits.top_p)
        cut[:, 0] = False
        kept = kept.masked_fill(cut, -math.inf)
        complete |= ~has_k & has_p & (sums[:, -1:] >= limits.top_p)

    floor = values[:, :1] + limits.min_p.log()  # minus infinity for a min_p of 0
    kept = kept.masked_fill(values < floor, -math.inf)
    complete |= ~has_k & (lowest < floor)

    if limits.some_typical_p:
        kept = kept.masked_fill(_untypical(kept, limits.typical_p), -math.inf)
    return kept, complete


def _untypical(scores: Tensor, mass: Tensor) -> Tensor:
    """The tokens that locally typical sampling drops, where its `mass` is below 1."""
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum(-1, keepdim=True)
    certainty, order = highest(-(logprobs + entropy).abs(), scores.shape[1])
    sums = probabilities.gather(1, order).cumsum(-1)
    last = (sums < mass).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    cut = certainty < certainty.gather(1, last)
    return torch.zeros_like(cut).scatter(1, order, cut) & (mass < 1)
