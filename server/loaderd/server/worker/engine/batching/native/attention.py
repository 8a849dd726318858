"""The attention of a step on a CPU: rows by a kernel of ours, prompts by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loaderd.server.worker.engine.batching.attention import Chunk, StepAttention
from loaderd.server.worker.engine.batching.attention_kernels import Rule
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.native.kernels import Kernels, Rows


class NativeAttention:
    """As `StepAttention`, which computes what the kernel is not for.

    All rows take one call, whatever their slots and lengths are.

    Args:
        cache: Has the keys and values of the tokens before.
        chunks: The step's tokens, in the order of the input; those that decode first.
        kernels: Ours.

    Attributes:
        windows: By layer that was asked, how far it looks back; None for all the way.
    """

    def __init__(self, cache: KvCache, chunks: Sequence[Chunk], kernels: Kernels) -> None:
        self._cache = cache
        self._kernels = kernels
        count = next((i for i, one in enumerate(chunks) if one.count > 1), len(chunks))
        self._rows = Rows(
            torch.tensor([row.slot for row in chunks[:count]]),
            torch.tensor([row.begin for row in chunks[:count]]),
        )
        self._prompts = StepAttention(cache, chunks[count:])
        self._all = StepAttention(cache, chunks)
        self.windows = self._all.windows

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """See `Attention`."""
        rows = len(self._rows.slots)
        if not (rows and rule.is_plain and self._kernels.can_attend(query, key, value)):
            return self._all.attend(layer_index, query, key, value, rule)
        self.windows[layer_index] = rule.window
        layer = self._cache.layer(layer_index, key, value)
        attended = self._kernels.attend(
            query[:rows],
            key[:rows],
            value[:rows],
            (layer.keys, layer.values),
            self._rows,
            window=rule.window,
            scaling=rule.scale(query.shape[-1]),
        )
        if rows == len(query):
            return attended
        others = self._prompts.attend(layer_index, query[rows:], key[rows:], value[rows:], rule)
        return torch.cat((attended, others))
