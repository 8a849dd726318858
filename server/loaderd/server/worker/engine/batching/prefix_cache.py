"""Which beginnings of prompts are kept, and where. Pure: it moves no keys and values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_Place = tuple[int | str, tuple[int, ...]]
"""The block before, or the salt, and the block's own tokens."""


@dataclass(frozen=True, slots=True)
class _Kept:
    number: int
    block: int


class PrefixCache:
    """A bounded tree of blocks of tokens, of which the least recently used go first.

    A block's keys and values depend on all tokens before it, so a block is found only after
    those before it. Blocks are touched last one first: the leaves of the tree are always older
    than what they hang on, and no block goes before those after it.

    Args:
        blocks: How many there are, numbered from 0.
        block_tokens: Tokens of a block.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._kept: OrderedDict[_Place, _Kept] = OrderedDict()
        self._free = list(range(blocks))
        self._numbers = 0

    def match(self, tokens: Sequence[int], salt: str) -> list[int]:
        """The blocks of the longest beginning that is kept."""
        places = [place for place, _ in self._walk(tokens, salt)]
        self._touch(places)
        return [self._kept[place].block for place in places]

    def insert(self, tokens: Sequence[int], salt: str) -> tuple[int, list[int]]:
        """Keeps a beginning, in whole blocks.

        Returns:
            How many of its tokens are kept already, and the blocks that the caller fills with
            what follows; fewer than there are tokens for when the cache is too small.
        """
        size = self._block_tokens
        path = list(self._walk(tokens, salt))
        places = [place for place, _ in path]
        self._touch(places)
        parent: int | str = path[-1][1].number if path else salt
        known = len(path)
        for index in range(known, len(tokens) // size):
            block = self._room(len(places))
            if block is None:
                break
            place = parent, tuple(tokens[index * size : (index + 1) * size])
            self._numbers += 1
            parent = self._numbers
            self._kept[place] = _Kept(parent, block)
            places.append(place)
        self._touch(places)
        return known * size, [self._kept[place].block for place in places[known:]]

    def drop(self, blocks: Collection[int]) -> None:
        """Forgets blocks that `insert` has just given: they could not be filled."""
        for place in [place for place, kept in self._kept.items() if kept.block in blocks]:
            self._free.append(self._kept.pop(place).block)

    def _walk(self, tokens: Sequence[int], salt: str) -> Iterator[tuple[_Place, _Kept]]:
        parent: int | str = salt
        size = self._block_tokens
        for begin in range(0, len(tokens) - size + 1, size):
            place = parent, tuple(tokens[begin : begin + size])
            kept = self._kept.get(place)
            if kept is None:
                return
            yield place, kept
            parent = kept.number

    def _touch(self, places: Sequence[_Place]) -> None:
        for place in reversed(places):
            self._kept.move_to_end(place)

    def _room(self, own: int) -> int | None:
        """A free block, maybe of one that goes; None when only the caller's own are left."""
        if self._free:
            return self._free.pop()
        if len(self._kept) <= own:
            return None
        _, gone = self._kept.popitem(last=False)
        return gone.block
