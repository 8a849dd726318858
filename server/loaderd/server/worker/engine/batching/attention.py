"""The attention function that transformers' models call, over keys and values in slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from loaderd.server.worker.engine.batching.attention_kernels import (
    Rule,
    attend_prompt,
    attend_rows,
    seen_mask,
)
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.transfer import sent

NAME = "loaderd"
"""What the function is registered as; no mask is, so that models make none."""

_WASTE = 4096
"""Masked tokens that cost about as much as one more call, over all rows of a span."""

_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request in a step.

    Attributes:
        slot: Where its keys and values are.
        begin: Position of the first token.
        count: How many; 1 for a request that decodes.
    """

    slot: int
    begin: int
    count: int


class Attention(Protocol):
    """The attention of one step, which all layers ask."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """Attention of all tokens of the step.

        Args:
            layer_index: Of the layer.
            query: [tokens, heads, dimensions].
            key: [tokens, key heads, dimensions]; goes into the cache.
            value: As `key`.
            rule: How.

        Returns:
            [tokens, heads, dimensions].
        """


class StepAttention:
    """The attention of any step: which tokens there are, and what each may see.

    Index tensors and masks are made at their first use and shared by all layers.

    Args:
        cache: Has the keys and values of the tokens before.
        chunks: The step's tokens, in the order of the input; those that decode first, by slot.
    """

    def __init__(self, cache: KvCache, chunks: Sequence[Chunk]) -> None:
        self.windows: dict[int, int | None] = {}
        self._cache = cache
        self._chunks = chunks
        self._spans = list(_spans(chunks))
        self._memory: dict[Any, Any] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """See `Attention`."""
        self.windows[layer_index] = rule.window
        layer = self._cache.layer(layer_index, key, value)
        self._write(layer.keys, key)
        self._write(layer.values, value)
        if len(self._spans) == 1:
            return self._spans[0].attend(query, layer.keys, layer.values, rule, self._memory)
        parts = query.split([span.tokens for span in self._spans])
        return torch.cat(
            [
                span.attend(part, layer.keys, layer.values, rule, self._memory)
                for span, part in zip(self._spans, parts, strict=True)
            ]
        )

    def _write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        if len(self._chunks) == 1:
            chunk = self._chunks[0]
            end = chunk.begin + chunk.count
            buffer[chunk.slot, :, chunk.begin : end] = new.transpose(0, 1)
            return
        slots, positions = _once(self._memory, ("places", buffer.device), self._places)
        buffer[slots, :, positions] = new

    def _places(self, _key: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        slots = [chunk.slot for chunk in self._chunks for _ in range(chunk.count)]
        positions = [chunk.begin + i for chunk in self._chunks for i in range(chunk.count)]
        both = sent(torch.tensor([slots, positions]), device)
        return both[0], both[1]


class _Decodes:
    """One token each of requests in neighbouring slots."""

    def __init__(self, slot: int, positions: Sequence[int]) -> None:
        self.tokens = len(positions)
        self._slots = slice(slot, slot + len(positions))
        self._positions = positions
        self._end = max(positions) + 1
        self._equal = len(set(positions)) == 1

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: Rule,
        memory: dict[Any, Any],
    ) -> torch.Tensor:
        begin = _begin(min(self._positions), rule.window)
        keys = keys[self._slots, :, begin : self._end]
        values = values[self._slots, :, begin : self._end]
        mask = None
        if not self._equal:
            key = (self, begin, rule.window, query.dtype, query.device)
            mask = _once(memory, key, self._mask)
        return attend_rows(query, keys, values, mask, rule)

    def _mask(
        self,
        _span: object,
        begin: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        positions = sent(torch.tensor(self._positions), device).view(-1, 1, 1, 1)
        return seen_mask(positions, begin, self._end, window, dtype)


class _Prompt:
    """A piece of one request's prompt."""

    def __init__(self, chunk: Chunk) -> None:
        self.tokens = chunk.count
        self._chunk = chunk
        self._end = chunk.begin + chunk.count

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: Rule,
        memory: dict[Any, Any],
    ) -> torch.Tensor:
        slot = self._chunk.slot
        begin = _begin(self._chunk.begin, rule.window)
        keys = keys[slot : slot + 1, :, begin : self._end]
        values = values[slot : slot + 1, :, begin : self._end]
        query = query.transpose(0, 1).unsqueeze(0)
        whole = self._chunk.begin == 0 and (rule.window is None or self._end <= rule.window)
        mask = None
        if not (whole and rule.is_plain):
            key = (self, begin, rule.window, query.dtype, query.device)
            mask = _once(memory, key, self._mask)
        output = attend_prompt(query, keys, values, mask, rule)
        return output[0].transpose(0, 1)

    def _mask(
        self,
        _span: object,
        begin: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        positions = torch.arange(self._chunk.begin, self._end, device=device).view(1, 1, -1, 1)
        return seen_mask(positions, begin, self._end, window, dtype)


@contextmanager
def attending(step: Attention) -> Iterator[None]:
    """Forward passes of this thread are this step's."""
    _thread.step = step
    try:
        yield
    finally:
        del _thread.step


def _function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it."""
    if attention_mask is not None:
        raise ValueError("the model makes a mask of its own")
    step: Attention = _thread.step
    rule = Rule(scaling, sliding_window, softcap, s_aux)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = step.attend(module.layer_idx, queries, keys, values, rule)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, _function)


def _spans(chunks: Sequence[Chunk]) -> Iterator[_Decodes | _Prompt]:
    """The step in as few calls as its holes and unequal lengths allow."""
    index = 0
    while index < len(chunks):
        if chunks[index].count > 1:
            yield _Prompt(chunks[index])
            index += 1
            continue
        end = _end_of_span(chunks, index)
        yield _Decodes(chunks[index].slot, [chunk.begin for chunk in chunks[index:end]])
        index = end


def _end_of_span(chunks: Sequence[Chunk], index: int) -> int:
    """Goes on while slots are neighbours and rows need little masking."""
    first = chunks[index]
    longest = shortest = first.begin
    end = index + 1
    while end < len(chunks):
        chunk = chunks[end]
        if chunk.count > 1 or chunk.slot != first.slot + end - index:
            break
        longest, shortest = max(longest, chunk.begin), min(shortest, chunk.begin)
        if (longest - shortest) * (end - index) > _WASTE:
            break
        end += 1
    return end


def _begin(position: int, window: int | None) -> int:
    return 0 if window is None else max(position - window + 1, 0)


def _once(memory: dict[Any, Any], key: tuple[Any, ...], make: Callable[..., Any]) -> Any:
    if key not in memory:
        memory[key] = make(*key)
    return memory[key]
