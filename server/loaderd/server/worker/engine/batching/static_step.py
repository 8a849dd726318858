"""Decode steps whose shapes and operators depend on nothing but two rounded sizes.

On a GPU a decode step of most models is bound by the launches of its many small kernels. CUDA can
record them once and launch them all with one call, if every launch has the same shapes and
addresses. So here all slots up to the last one in use take part, rounded up, each with the same
rounded number of tokens; what differs from step to step is in tensors that stay where they are.
"""

from __future__ import annotations

import bisect
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.attention_kernels import Rule, attend_rows, seen_mask
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import Forward
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.transfer import sent

logger = logging.getLogger(__name__)

_FEW_ROWS = (1, 2, 4)
_ROWS = 8
"""Rows are rounded up to a multiple of this, where they are more than a few."""
_LEAST_LENGTH = 256
"""Lengths are rounded up to a power of two, and to no less than this."""
_PATIENCE = 4
"""Steps of a shape that go the usual way, before it counts as one that comes again."""
_MOST_GRAPHS = 32

_TOKEN_IDS, _POSITIONS, _PLACES, _WANTED = range(4)


class CaptureError(Exception):
    """Work cannot be recorded; the device is as it was, and the text says why, to operators."""


class Graphs(Protocol):
    """Records what a device computes."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records some work.

        Args:
            work: Reads and writes tensors that stay where they are. It is done a few times, the
                recording included, and has the same effect each time.

        Returns:
            Does the recorded work again.

        Raises:
            CaptureError: It cannot be recorded.
        """


class StaticAttention:
    """The attention of one token of each of the first slots.

    Args:
        cache: Has the keys and values of the tokens before.
        slots: [rows]: 0, 1, 2 and so on.
        places: [rows]; where each row's key and value go in its slot.
        positions: [rows]; how far each row may look.
        length: Tokens of each slot that take part; more than any of the positions.
    """

    def __init__(
        self,
        cache: KvCache,
        slots: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        length: int,
    ) -> None:
        self._cache = cache
        self._slots = slots
        self._places = places
        self._positions = positions.view(-1, 1, 1, 1)
        self._length = length
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """See `Attention`."""
        layer = self._cache.layer(layer_index, key, value)
        layer.keys[self._slots, :, self._places] = key
        layer.values[self._slots, :, self._places] = value
        keys, values = (
            buffer[: len(self._slots), :, : self._length] for buffer in (layer.keys, layer.values)
        )
        return attend_rows(query, keys, values, self._mask(rule.window, query.dtype), rule)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        key = window, dtype
        if key not in self._masks:
            self._masks[key] = seen_mask(self._positions, 0, self._length, window, dtype)
        return self._masks[key]


class StaticSteps:
    """Decode steps that are recorded once and then replayed.

    A row is a slot, so that the rows' keys and values are a slice of the cache. Slots that put
    nothing into a step compute along: they see their own first token only, write behind all that
    is ever read, and nobody looks at their logits.

    Args:
        forward: The model.
        cache: For keys and values; has spare places.
        device: Of the model.
        graphs: Records.
        patience: Steps of a shape that are left to others before it is recorded.
        most_graphs: Recordings that are kept; the one that was not used for longest goes.

    Attributes:
        failure: Why nothing is recorded any more; None while all is well.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KvCache,
        device: torch.device,
        graphs: Graphs,
        *,
        patience: int = _PATIENCE,
        most_graphs: int = _MOST_GRAPHS,
    ) -> None:
        if cache.spare_place is None:
            raise ValueError("the cache has no spare places")
        self.failure: str | None = None
        self._forward = forward
        self._cache = cache
        self._spare_place = cache.spare_place
        self._device = device
        self._graphs = graphs
        self._patience = patience
        self._most_graphs = most_graphs
        self._row_sizes = [*_FEW_ROWS, *range(_ROWS, cache.slots + _ROWS, _ROWS)]
        self._slots = torch.arange(cache.slots, device=device)
        self._inputs = torch.zeros(4, cache.slots, dtype=torch.int64, device=device)
        self._logits: torch.Tensor | None = None
        self._replays: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()
        self._seen = Counter[tuple[int, int]]()

    def run(self, feeds: Sequence[Feed]) -> torch.Tensor | None:
        """One forward pass, if it is one that can be replayed.

        Args:
            feeds: At least one, each slot at most once.

        Returns:
            Logits in float32 [wanted tokens, vocabulary], in the order of the feeds, and the
            caller's own; None if the step is to be computed otherwise.
        """
        if self.failure is not None or any(len(feed.token_ids) != 1 for feed in feeds):
            return None
        shape = self._shape(feeds)
        self._seen[shape] += 1
        if self._seen[shape] <= self._patience:
            return None
        wanted = self._fill(feeds, shape[0])
        replay = self._replays.get(shape) or self._capture(shape)
        if replay is None:
            return None
        self._replays.move_to_end(shape)
        replay()
        if self._logits is None:
            raise RuntimeError("the recorded work brought no logits")
        # Copies: the next replay overwrites the logits.
        return self._logits.index_select(0, self._inputs[_WANTED, :wanted])

    def _shape(self, feeds: Sequence[Feed]) -> tuple[int, int]:
        """Rows and length."""
        rows = max(feed.slot for feed in feeds) + 1
        rows = self._row_sizes[bisect.bisect_left(self._row_sizes, rows)]
        length = max(feed.begin for feed in feeds) + 1
        length = max(_LEAST_LENGTH, 1 << (length - 1).bit_length())
        return min(rows, self._cache.slots), min(length, self._cache.tokens)

    def _fill(self, feeds: Sequence[Feed], rows: int) -> int:
        """Tells what differs from step to step; returns how many logits are wanted."""
        wanted = [feed.slot for feed in feeds if feed.wants]
        columns = [(0, 0, self._spare_place)] * rows
        for feed in feeds:
            columns[feed.slot] = feed.token_ids[0], feed.begin, feed.begin
        padding = [0] * (rows - len(wanted))
        table = torch.tensor([*zip(*columns, strict=True), (*wanted, *padding)])
        self._inputs[:, :rows].copy_(sent(table, self._device))
        return len(wanted)

    def _capture(self, shape: tuple[int, int]) -> Callable[[], None] | None:
        try:
            replay = self._graphs.capture(lambda: self._compute(*shape))
        except CaptureError as error:
            self._give_up(str(error))
            return None
        self._replays[shape] = replay
        # Only now: the recordings share memory that would go with the last one of them.
        if len(self._replays) > self._most_graphs:
            gone, _ = self._replays.popitem(last=False)
            del self._seen[gone]
        return replay

    def _compute(self, rows: int, length: int) -> None:
        inputs = self._inputs[:, :rows]
        attention = StaticAttention(
            self._cache, self._slots[:rows], inputs[_PLACES], inputs[_POSITIONS], length
        )
        logits = self._forward(inputs[_TOKEN_IDS], inputs[_POSITIONS], attention, None)
        if self._logits is None:
            self._logits = logits.new_empty(len(self._slots), logits.shape[1], dtype=torch.float32)
        self._logits[:rows].copy_(logits)

    def _give_up(self, why: str) -> None:
        """For good: what failed once may have taken memory, and would take time again."""
        logger.warning("decode steps are not replayed any more: %s", why)
        self.failure = why
        self._replays.clear()
        self._logits = None
        devices.release_cached_memory()
