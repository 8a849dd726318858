"""What each client has of what is limited."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loaderd.server.access.caller import Caller
from loaderd.server.errors import ClientLimitError

_RETRY_S = 1


@dataclass
class _Bucket:
    """Tokens that a client has left; below 0 when what it asked for took more than there were."""

    left: float
    since: float


class Quotas:
    """Counts streams, requests and tokens of clients, and refuses what is too much.

    Clients without a name have no limits and are not counted.

    Args:
        clock: Tells monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_use: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._buckets: dict[str, _Bucket] = {}

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Counts a stream while it is open.

        Raises:
            ClientLimitError: The client has too many.
        """
        with self._counted("streams", caller, caller.limits.streams):
            yield

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Counts a request while it runs or waits.

        Raises:
            ClientLimitError: The client has too many, or no tokens left.
        """
        self._check_tokens(caller)
        with self._counted("requests", caller, caller.limits.requests):
            yield

    def charge(self, caller: Caller, tokens: int) -> None:
        """Takes off the tokens that a request has used."""
        rate = caller.limits.tokens_per_minute
        if caller.name and rate is not None:
            self._filled(caller.name, rate).left -= tokens

    @contextmanager
    def _counted(self, limit: str, caller: Caller, most: int | None) -> Iterator[None]:
        if not caller.name:
            yield
            return
        counts = self._in_use[caller.name]
        if most is not None and counts[limit] >= most:
            raise ClientLimitError(caller.name, limit, most, _RETRY_S)
        counts[limit] += 1
        try:
            yield
        finally:
            counts[limit] -= 1
            if not +counts:
                self._in_use.pop(caller.name, None)

    def _check_tokens(self, caller: Caller) -> None:
        rate = caller.limits.tokens_per_minute
        if not caller.name or rate is None:
            return
        left = self._filled(caller.name, rate).left
        if left < 1:
            wait_s = math.ceil((1 - left) * 60 / rate)
            raise ClientLimitError(caller.name, "tokens_per_minute", rate, wait_s)

    def _filled(self, name: str, rate: int) -> _Bucket:
        """A client's bucket, which fills within a minute and holds what is for one."""
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(rate, now))
        bucket.left = min(rate, bucket.left + (now - bucket.since) * rate / 60)
        bucket.since = now
        return bucket
