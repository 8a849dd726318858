"""Keys and values of the running requests: a slot each, contiguous in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

BLOCK = 16
"""Tokens of a block, the unit in which prefixes are kept."""


class KvCache:
    """Per layer two buffers [slots, heads, tokens, dimensions], on the device of that layer.

    A slot is one stretch of memory, so that a run of slots is a slice of the batch and not a
    gather. On a CPU the system backs only what is written, and gets back what free slots hold
    beyond `idle_tokens`.

    Beside the slots there are blocks of finished prompts, see `keep` and `take`.

    Args:
        slots: Most slots.
        tokens: Most tokens of a slot.
        blocks: Blocks for prefixes.
        idle_tokens: Tokens of free slots whose memory is not given back, for those that come next.
    """

    def __init__(self, slots: int, tokens: int, blocks: int, idle_tokens: int = 0) -> None:
        self.slots = slots
        self.tokens = tokens
        self.blocks = blocks
        self._layers: dict[int, _Layer] = {}
        self._idle_tokens = idle_tokens
        self._idle: dict[int, int] = {}

    @property
    def bytes_per_token(self) -> int:
        """Of all layers that have been written to."""
        return sum(layer.bytes_per_token for layer in self._layers.values())

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> _Layer:
        """The buffers of a layer, which its first keys and values shape.

        Args:
            index: Of the layer.
            key: [tokens, heads, dimensions].
            value: Alike; its dimensions may be others.
        """
        layer = self._layers.get(index)
        if layer is None:
            layer = self._layers[index] = _Layer(self, key, value)
        return layer

    def copy(self, source: int, target: int, tokens: int, first: int = 0) -> None:
        """Copies a slot's first tokens into another slot.

        Args:
            source: Copied from.
            target: Copied to.
            tokens: Where the copy ends.
            first: Where it begins; the target has the tokens before.
        """
        for layer in self._layers.values():
            for buffer in (layer.keys, layer.values):
                buffer[target, :, first:tokens] = buffer[source, :, first:tokens]

    def free(self, slot: int, tokens: int) -> None:
        """A slot of so many tokens is not needed now; it can be written to again at any time."""
        self._idle[slot] = max(tokens, self._idle.get(slot, 0))
        if sum(self._idle.values()) > self._idle_tokens:
            del self._idle[slot]
            for layer in self._layers.values():
                layer.discard(slot)

    def keep(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Copies tokens of a slot into blocks.

        Args:
            slot: Which.
            first: Where in the slot the first block begins, in tokens.
            blocks: Where to, in order.
        """
        count = len(blocks) * BLOCK
        for layer in self._layers.values():
            index = torch.tensor(blocks, device=layer.keys.device)
            for buffer, kept in layer.pairs():
                # [heads, tokens, d] -> [blocks, heads, BLOCK, d]
                tokens = buffer[slot, :, first : first + count].unflatten(1, (-1, BLOCK))
                kept.index_copy_(0, index, tokens.transpose(0, 1))

    def take(self, slot: int, blocks: Sequence[int]) -> None:
        """Copies blocks to the beginning of a slot."""
        count = len(blocks) * BLOCK
        for layer in self._layers.values():
            index = torch.tensor(blocks, device=layer.keys.device)
            for buffer, kept in layer.pairs():
                tokens = kept.index_select(0, index).transpose(0, 1).flatten(1, 2)
                buffer[slot, :, :count] = tokens


class _Layer:
    """One layer's buffers."""

    def __init__(self, cache: KvCache, key: torch.Tensor, value: torch.Tensor) -> None:
        (self.keys, keys_memory), (self.values, values_memory) = (
            _buffer(cache.slots, cache.tokens, new) for new in (key, value)
        )
        self._memories = [memory for memory in (keys_memory, values_memory) if memory is not None]
        (self._kept_keys, _), (self._kept_values, _) = (
            _buffer(cache.blocks, BLOCK, new) for new in (key, value)
        )

    @property
    def bytes_per_token(self) -> int:
        return sum(b.shape[1] * b.shape[3] * b.itemsize for b in (self.keys, self.values))

    def pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (self.keys, self._kept_keys), (self.values, self._kept_values)

    def discard(self, slot: int) -> None:
        for memory in self._memories:
            size = len(memory) // self.keys.shape[0]
            # Whole pages, none of a neighbour's; these read as zeros afterwards.
            begin = -(-slot * size // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (slot + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin and hasattr(memory, "madvise"):
                memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _buffer(slots: int, tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, mmap.mmap | None]:
    """Zeros: what is masked takes part in products, and must be finite.

    Returns:
        The buffer, and the memory below it where the system backs only what is written.
    """
    shape = slots, like.shape[1], tokens, like.shape[2]
    if like.device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=like.dtype, device=like.device), None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, math.prod(shape) * like.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape), memory
