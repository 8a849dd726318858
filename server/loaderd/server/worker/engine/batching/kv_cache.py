"""Keys and values of the running requests: a slot each, contiguous in memory."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from loaderd.server.worker.engine.batching.transfer import sent

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
        spare: Whether each slot has a place more that is written to and never read.

    Attributes:
        spare_place: Where in each slot that is; None without.
    """

    def __init__(
        self, slots: int, tokens: int, blocks: int, idle_tokens: int = 0, *, spare: bool = False
    ) -> None:
        self.slots = slots
        self.tokens = tokens
        self.blocks = blocks
        self.spare_place = tokens if spare else None
        self._layers: dict[int, _Layer] = {}
        self._idle_tokens = idle_tokens
        self._idle: dict[int, int] = {}

    @property
    def bytes_per_token(self) -> Mapping[torch.device, int]:
        """By device, of all its layers that have been written to."""
        sizes = Counter[torch.device]()
        for layer in self._layers.values():
            sizes[layer.keys.device] += layer.bytes_per_token
        return sizes

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

    def wipe(self, slot: int, tokens: int) -> None:
        """Sets a slot's first tokens to zeros."""
        for layer in self._layers.values():
            for buffer in (layer.keys, layer.values):
                buffer[slot, :, :tokens] = 0.0

    def reserve(self, slot: int) -> None:
        """A slot is in use from now on."""
        self._idle.pop(slot, None)

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
        for layer, index in self._layers_with(blocks):
            for buffer, kept in layer.pairs():
                # [heads, tokens, d] -> [blocks, heads, BLOCK, d]
                tokens = buffer[slot, :, first : first + count].unflatten(1, (-1, BLOCK))
                kept.index_copy_(0, index, tokens.transpose(0, 1))

    def take(self, slot: int, blocks: Sequence[int]) -> None:
        """Copies blocks to the beginning of a slot."""
        count = len(blocks) * BLOCK
        for layer, index in self._layers_with(blocks):
            for buffer, kept in layer.pairs():
                tokens = kept.index_select(0, index).transpose(0, 1).flatten(1, 2)
                buffer[slot, :, :count] = tokens

    def _layers_with(self, blocks: Sequence[int]) -> Iterator[tuple[_Layer, torch.Tensor]]:
        """The layers, each with the numbers of blocks on its device."""
        numbers = torch.tensor(blocks)
        indexes: dict[torch.device, torch.Tensor] = {}
        for layer in self._layers.values():
            device = layer.keys.device
            if device not in indexes:
                indexes[device] = sent(numbers, device)
            yield layer, indexes[device]


class _Layer:
    """One layer's buffers."""

    def __init__(self, cache: KvCache, key: torch.Tensor, value: torch.Tensor) -> None:
        places = cache.tokens + (cache.spare_place is not None)
        (self.keys, keys_memory), (self.values, values_memory) = (
            _buffer(cache.slots, places, new) for new in (key, value)
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
