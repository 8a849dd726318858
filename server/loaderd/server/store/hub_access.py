"""How the hub is asked: where, as whom, how often."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from loaderd.server.store.hub_errors import domain_error
from loaderd.server.store.hub_guard import HubBusyError
from loaderd.server.store.names import HubName

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to wait for a hub that is busy or breaks off.

    Attributes:
        attempts: How often to ask in all.
        first_wait: Seconds before the second attempt; each further wait is twice as long.
        longest_wait: Bound of every wait in seconds, also of what the hub asks for.
    """

    attempts: int = 4
    first_wait: float = 0.5
    longest_wait: float = 10.0

    def call(
        self,
        function: Callable[[], T],
        *,
        on: tuple[type[Exception], ...],
        wait: Callable[[float], None] = time.sleep,
        reached: Callable[[], int] = lambda: 0,
    ) -> T:
        """Calls a function until it succeeds, or raises what it raised last.

        Args:
            function: What to call.
            on: The errors after which to call again.
            wait: How to wait.
            reached: How far the function has come. Attempts count afresh when it comes further
                than ever before.
        """
        attempt, furthest = 0, reached()
        while True:
            try:
                return function()
            except on as error:
                here = reached()
                attempt = 1 if here > furthest else attempt + 1
                furthest = max(furthest, here)
                if attempt >= self.attempts:
                    raise
                seconds = self._wait(attempt, error)
                _log.warning("%s; asking again in %.1f s", error, seconds)
            wait(seconds)

    def _wait(self, attempt: int, error: Exception) -> float:
        seconds = self.first_wait * 2.0 ** (attempt - 1)
        if isinstance(error, HubBusyError) and error.retry_after is not None:
            seconds = max(seconds, error.retry_after)
        return min(seconds, self.longest_wait)


@dataclass(frozen=True)
class HubAccess:
    """A hub, and who asks it.

    Attributes:
        endpoint: Its address.
        token: The hub token; None asks without one, whatever the environment holds.
        retry: How often to ask when it is busy.
    """

    endpoint: str
    token: str | None = field(default=None, repr=False)
    retry: RetryPolicy = RetryPolicy()

    @property
    def library_token(self) -> str | bool:
        """The token as the hub library takes it, for which None means to look for one."""
        return self.token or False


@contextmanager
def domain_errors(name: HubName) -> Iterator[None]:
    """Turns what the hub library raises into domain errors."""
    try:
        yield
    except Exception as error:
        meaning = domain_error(error, name)
        if meaning is None or meaning is error:
            raise
        _log.warning("%s: %s", name, str(error).partition("\n")[0])
        raise meaning from error
