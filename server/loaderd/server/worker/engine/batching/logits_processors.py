"""Masks and penalties, applied to the logits of many requests at once.

Each touches few tokens of a row, so all work here is on lists of entries (row, token id) of the
whole batch: a handful of operators a step, however many requests there are, and nothing of the
vocabulary's size but for rows with `allowed_token_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaderd.server.worker.engine.batching.history import History, TokenIds
from loaderd.server.worker.engine.batching.transfer import sent


def process(logits: Tensor, rows: Sequence[tuple[int, History]]) -> None:
    """Applies masks and penalties in place, in the order in which transformers applies them.

    That is: bias, repetition penalty, presence and frequency penalty (which transformers lacks),
    repeated n-grams, bad words and too early an end, allowed tokens.

    Args:
        logits: [rows, vocabulary], float32, contiguous.
        rows: The rows that have any, and what is known of their tokens.
    """
    entries = _Entries(logits)
    _add_bias(entries, rows)
    _penalize(entries, rows)
    _forbid(entries, rows)
    _allow_only(entries, logits, rows)


class _Entries:
    """Entries of a matrix, by row and column."""

    def __init__(self, matrix: Tensor) -> None:
        self.values = matrix.view(-1)
        self._columns = matrix.shape[1]

    def at(self, places: Sequence[tuple[int, TokenIds]]) -> Tensor:
        """Where the entries of these rows and columns are in `values`."""
        flat = np.concatenate([row * self._columns + columns for row, columns in places])
        return self.tensor(flat)

    def tensor(self, array: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
        """The array on the matrix's device."""
        return sent(torch.from_numpy(array), self.values.device)


def _add_bias(entries: _Entries, rows: Sequence[tuple[int, History]]) -> None:
    biased = [(row, history) for row, history in rows if len(history.bias_ids)]
    if biased:
        index = entries.at([(row, history.bias_ids) for row, history in biased])
        bias = np.concatenate([history.bias for _, history in biased])
        entries.values.index_add_(0, index, entries.tensor(bias))


def _penalize(entries: _Entries, rows: Sequence[tuple[int, History]]) -> None:
    counted = [
        (row, history.counts, history.sampling)
        for row, history in rows
        if history.counts is not None and len(history.counts.token_ids)
    ]
    if not counted:
        return
    index = entries.at([(row, counts.token_ids) for row, counts, _ in counted])
    lengths = [len(counts.token_ids) for _, counts, _ in counted]

    def spread(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, np.float32), lengths)

    counts = np.concatenate([counts.counts for _, counts, _ in counted])
    presence = spread([sampling.presence_penalty for *_, sampling in counted])
    frequency = spread([sampling.frequency_penalty for *_, sampling in counted])
    repetition = entries.tensor(spread([sampling.repetition_penalty for *_, sampling in counted]))
    values = entries.values[index]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= entries.tensor(presence * (counts > 0) + frequency * counts)
    entries.values.index_copy_(0, index, values)


def _forbid(entries: _Entries, rows: Sequence[tuple[int, History]]) -> None:
    places = [(row, history.forbidden_ids()) for row, history in rows]
    places = [(row, token_ids) for row, token_ids in places if len(token_ids)]
    if places:
        entries.values.index_fill_(0, entries.at(places), -math.inf)


def _allow_only(entries: _Entries, logits: Tensor, rows: Sequence[tuple[int, History]]) -> None:
    places = [
        (row, history.allowed_ids) for row, history in rows if history.allowed_ids is not None
    ]
    if places:
        index = entries.at(places)
        kept = entries.values[index]
        for row, _ in places:
            logits[row].fill_(-math.inf)
        entries.values.index_copy_(0, index, kept)
