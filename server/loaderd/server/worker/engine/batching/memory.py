"""What the slots hold: keys and values of what runs, and of prompts that were computed before."""

from __future__ import annotations

from loaderd.server.worker.engine.batching.job import Row
from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache
from loaderd.server.worker.engine.batching.prefix_cache import PrefixCache


class Memory:
    """Fills, copies and frees the slots of rows.

    Args:
        cache: The runner's.
        prefixes: Says what is in the cache's blocks.
    """

    def __init__(self, cache: KvCache, prefixes: PrefixCache) -> None:
        self._cache = cache
        self._prefixes = prefixes

    def reserve(self, row: Row) -> None:
        """Its slot is in use from now on."""
        self._cache.reserve(row.slot)

    def take_prefix(self, row: Row) -> None:
        """Begins an empty slot with what is known of the prompt."""
        request = row.job.request
        if request.bypass_prefix_cache:
            return
        # The last token is always computed: its logits are needed.
        blocks = self._prefixes.match(request.prompt[:-1], request.cache_salt)
        if blocks:
            self._cache.take(row.slot, blocks)
        row.length = row.job.cached = len(blocks) * BLOCK

    def keep_prefix(self, row: Row) -> None:
        """Remembers what a slot holds, for prompts that begin alike."""
        request = row.job.request
        if request.bypass_prefix_cache:
            return
        known, blocks = self._prefixes.insert(row.token_ids[: row.length], request.cache_salt)
        if blocks:
            try:
                self._cache.keep(row.slot, known, blocks)
            except BaseException:
                self._prefixes.drop(blocks)
                raise

    def fork(self, row: Row) -> None:
        """Copies a computed prompt to the other completions of its request."""
        for other in row.job.rows:
            if other is not row:
                self.follow(other, row)

    def follow(self, row: Row, source: Row) -> None:
        """Makes a row hold what another one of its request does.

        What both begin with was computed once and then copied, so it is there already.
        """
        first = row.common(source)
        self._cache.copy(source.slot, row.slot, source.length, first)
        row.token_ids[first:] = source.token_ids[first:]
        row.length = source.length

    def move(self, row: Row, slot: int) -> None:
        """Moves a row to another slot."""
        source, row.slot = row.slot, slot
        self.reserve(row)
        self._cache.copy(source, slot, row.length)
        self._cache.wipe(source, row.length)  # see `wipe`
        self._cache.free(source, row.length)

    def wipe(self, row: Row) -> None:
        """Its slot may hold what is no number, and goes to another.

        The next one there masks what it does not use of it, but no product hides that.
        """
        self._cache.wipe(row.slot, len(row.token_ids))

    def free(self, row: Row) -> None:
        """Its slot is not needed any more."""
        self._cache.free(row.slot, row.length)
